"""The rivals of GRPO_rank: numbers worked by hand, gradients, what ties do, and training."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch.testing import assert_close

import baselines
import lora
import train
from baselines import (
    best_of_loss,
    centred,
    dpo_loss,
    gae,
    group_zscores,
    leave_one_out,
    plackett_luce_loss,
    value_loss,
    whitened,
)
from grpo_rank import Objective, ranks_from_scores, rollout_loss
from oracle import READS, Ranking
from rollout import Completions

ROOT = Path(__file__).parents[2]
ORDER_LOSSES = {"dpo": dpo_loss, "plackett_luce": plackett_luce_loss, "best_of": best_of_loss}


# ---- by scores


def test_grpo_dr_grpo_and_rloo_of_worked_cases():
    rewards = torch.tensor([[1.0, 0, 0, 0, 1, 0, 0, 0]])  # mean 1/4, std 0.4629 over N - 1
    expected = torch.tensor([[1.620182, *[-0.540061] * 3, 1.620182, *[-0.540061] * 3]])
    assert_close(group_zscores(rewards), expected, atol=1e-5, rtol=0)
    assert_close(centred(rewards), rewards - 0.25, atol=1e-6, rtol=0)
    others = torch.tensor([[1 - 1 / 7, *[-2 / 7] * 3, 1 - 1 / 7, *[-2 / 7] * 3]])
    assert_close(leave_one_out(rewards), others, atol=1e-6, rtol=0)


def test_equal_scores_and_for_grpo_rounding_noise_have_no_advantage():
    scores = torch.tensor([[0.1] * 3, [0.3, 0.3 + 1e-7, 0.3]], dtype=torch.float64)
    assert group_zscores(scores).tolist() == [[0.0] * 3] * 2
    assert centred(scores)[0].tolist() == leave_one_out(scores)[0].tolist() == [0.0] * 3
    with pytest.raises(ValueError, match="finite"):
        centred(torch.tensor([[1.0, torch.nan]]))


def test_what_carries_a_signal_depends_on_what_the_objective_reads():
    """A ranker's margin ties scores that differ; ppo, without another answer as baseline, uses ties too."""
    ranks = torch.tensor([[0, 0], [0, 0], [0, 1], [0, 1]])
    scores = torch.tensor([[0.1, 0.2], [0.1, 0.1], [1.0, 0.0], [1.0, 0.0]])
    ranking = Ranking(ranks, torch.tensor([True, True, True, False]), scores=scores)
    expected = {"order": [0, 0, 1, 0], "scores": [1, 0, 1, 0], "level": [1, 1, 1, 0]}
    for reads, live in expected.items():
        ranking.reads = reads
        assert ranking.live.int().tolist() == live


# ---- by the order


def test_order_losses_of_worked_cases():
    worths, ranks = torch.tensor([[1.0, 0.0, 2.0]]), torch.tensor([[0, 1, 2]])
    assert_close(dpo_loss(worths, ranks), torch.tensor([1.313262]))  # log(1 + e^(2 - 1))
    # log(e + 1 + e^2) - 1, then log(1 + e^2) - 0, then 0
    assert_close(plackett_luce_loss(worths, ranks), torch.tensor([1.407606 + 2.126928]))
    assert_close(best_of_loss(worths, ranks), torch.tensor([-1.0]))
    two_best = torch.tensor([[0, 0, 2]])  # each of the two wins against the third alone, not each other
    assert_close(dpo_loss(worths, two_best), torch.tensor([(1.313262 + 2.126928) / 2]))
    assert_close(plackett_luce_loss(worths, two_best), torch.tensor([1.313262 + 2.126928]))
    assert_close(best_of_loss(worths, two_best), torch.tensor([-0.5]))


@pytest.mark.parametrize("name", ORDER_LOSSES)
@given(st.lists(st.integers(0, 4), min_size=2, max_size=7), st.randoms(use_true_random=False))
@settings(max_examples=40, deadline=None)
def test_an_order_loss_follows_its_answers_ignores_a_group_of_equals_and_lifts_the_best(name, quality, rng):
    ranks = ranks_from_scores(torch.tensor([quality]))
    worths = torch.tensor([[rng.uniform(-3, 3) for _ in quality]], dtype=torch.float64, requires_grad=True)
    loss = ORDER_LOSSES[name](worths, ranks)
    slope = torch.autograd.grad(loss.sum(), worths)[0]
    order = torch.tensor(rng.sample(range(len(quality)), len(quality)))
    assert_close(ORDER_LOSSES[name](worths[:, order], ranks[:, order]), loss)
    if (ranks == 0).all():
        assert loss.item() == 0 and (slope == 0).all()
    else:
        assert (slope[ranks == 0] < 0).all()
        assert name == "best_of" or (slope[ranks == ranks.max()] > 0).all()


def test_dpo_of_two_answers_is_plackett_luce_of_two():
    worths, ranks = torch.randn(6, 2), torch.tensor([[0, 1], [1, 0], [0, 0]]).repeat(2, 1)
    assert_close(dpo_loss(worths, ranks), plackett_luce_loss(worths, ranks))


def rollout_of(P, G, T, D, V, seed=0):
    """(states, states of the reference, head, completions) of random answers of unequal length, float64."""
    g = torch.Generator().manual_seed(seed)
    hidden, ref_hidden = torch.randn(2, P * G, T, D, generator=g, dtype=torch.float64)
    head = torch.randn(V, D, generator=g, dtype=torch.float64)
    lengths = torch.randint(1, T + 1, (P * G, 1), generator=g)
    ids, mask = torch.randint(V, (P * G, T), generator=g), torch.arange(T) < lengths
    banned = torch.arange(V) == V - 1
    ids = ids.masked_fill(banned[ids], 0)
    old = torch.zeros(P * G, T, dtype=torch.float64)
    completions = Completions(ids, mask, old, None, mask.any(dim=1), temperature=0.7, banned=banned)
    return hidden.requires_grad_(), ref_hidden, head, completions


def plain_sums(hidden, head, completions):
    logits = (hidden @ head.T / completions.temperature).masked_fill(completions.banned, -1e30)
    logprobs = logits.log_softmax(dim=-1).gather(2, completions.completion_ids[..., None]).squeeze(2)
    return (logprobs * completions.completion_mask).sum(dim=1)


@pytest.mark.parametrize("name", ORDER_LOSSES)
@pytest.mark.parametrize("micro", [1, 3])
def test_the_advantages_of_an_order_loss_give_its_gradient_however_the_step_is_split(name, micro):
    """Against autograd through log_softmax, mean over the groups, in float64."""
    P, G, T = 3, 4, 5
    hidden, ref_hidden, head, completions = rollout_of(P, G, T, D=6, V=11)
    ranks = ranks_from_scores(torch.tensor([[3, 1, 2, 0], [1, 1, 0, 0], [0, 2, 2, 1]]))
    sums, ref_sums = (plain_sums(x, head, completions) for x in (hidden, ref_hidden))
    lengths = completions.completion_mask.sum(dim=1)
    worths = sums / lengths if name == "best_of" else 0.3 * (sums - ref_sums)
    loss = ORDER_LOSSES[name](worths.view(P, G), ranks).mean()
    expected = torch.autograd.grad(loss, hidden)[0]

    rival, found = baselines.Ordered(name, 0.3, ranks), torch.zeros_like(hidden)
    for start in range(0, P, micro):
        rows = slice(start * G, (start + micro) * G)
        part, states = completions[rows], hidden.detach()[rows].requires_grad_()
        part, advantages = rival.signal(slice(start, start + micro), part, states, ref_hidden[rows], head)
        loss, stats = rollout_loss(states, head, part, advantages, Objective(), num_sequences=P * G,
                                   num_tokens=int(lengths.sum()))  # fmt: skip
        loss.backward()
        found[rows] = states.grad
        assert_close(stats["ratio"], part.completion_mask.sum().double())
    assert_close(found, expected, atol=1e-12, rtol=1e-9)


# ---- ppo


def test_gae_and_the_value_loss_are_the_vectors():
    # delta: 0 + .99 * .4 - .5, 0 + .99 * .6 - .4, 1 - .6; then A_t = delta_t + .99 * .95 A_t+1
    pad = torch.zeros(1, 3)
    rewards, values = torch.tensor([[0.0, 0.0, 1.0]]), torch.tensor([[0.5, 0.4, 0.6]])
    expected, mask = torch.tensor([[0.432273, 0.5702, 0.4]]), torch.ones(1, 3, dtype=torch.bool)
    assert_close(gae(rewards, values, mask, 0.99, 0.95), expected, atol=1e-6, rtol=0)
    longer = [torch.cat([x, pad + 9], dim=1) for x in (rewards, values)] + [torch.cat([mask, pad > 0], dim=1)]
    assert_close(gae(*longer, 0.99, 0.95), torch.cat([expected, pad], dim=1), atol=1e-6, rtol=0)
    v, R = torch.tensor([1.0, 0.6, 0.1, 0.9]), torch.tensor([2.0, 2.0, 2.0, 0.4])
    assert_close(value_loss(v, torch.full((4,), 0.5), R), torch.tensor([0.845, 0.98, 1.805, 0.125]))


def test_with_lambda_1_an_advantage_is_what_is_still_to_come_less_the_value():
    g = torch.Generator().manual_seed(0)
    rewards, values = torch.randn(2, 4, 6, generator=g)
    mask = torch.arange(6) < torch.tensor([[6], [3], [1], [0]])
    to_come = (rewards * mask).flip(1).cumsum(dim=1).flip(1)
    assert_close(gae(rewards, values, mask), (to_come - values) * mask)


def test_whitening_counts_the_tokens_of_the_mask_alone():
    values = torch.tensor([[1.0, 3.0, 100.0], [5.0, 7.0, -9.0]])
    mask = torch.tensor([[True, True, False]] * 2)
    assert_close(whitened(values, mask)[:, :2], (values[:, :2] - 4) / 5**0.5)  # variance (9 + 1 + 1 + 9) / 4
    assert (whitened(values, mask)[:, 2] == 0).all()


def test_advantages_of_tokens_give_the_policy_gradient_of_each_token():
    hidden, _, head, completions = rollout_of(2, 2, 3, D=4, V=7)
    completions.logprobs = torch.randn(4, 3, dtype=torch.float64)
    advantages = torch.randn(4, 3, dtype=torch.float64)
    mean = advantages.mean(dim=1)
    by_token, _ = rollout_loss(hidden, head, completions, mean[:, None].expand(4, 3), Objective())
    by_answer, _ = rollout_loss(hidden, head, completions, mean, Objective())
    assert_close(torch.autograd.grad(by_token, hidden)[0], torch.autograd.grad(by_answer, hidden)[0])
    scale = SimpleNamespace(loss=rollout_loss(hidden, head, completions, advantages, Objective())[0])
    assert abs(scale.loss - by_token).item() > 1e-6
    with pytest.raises(ValueError, match="advantages"):
        rollout_loss(hidden, head, completions, advantages[:, :2], Objective())


def test_the_critic_learns_returns_and_leaves_the_policy_alone():
    """Scores of 1 and -1 that the state tells apart: after some steps the values are near them."""
    hidden, ref_hidden, head, completions = rollout_of(2, 2, 3, D=4, V=7)
    hidden, head = hidden.float().detach().requires_grad_(), head.float()
    completions.logprobs = torch.zeros(4, 3)
    critic = baselines.Critic(4)
    critic.G, critic.num_tokens = 2, completions.completion_mask.sum().item()
    critic.advantages, critic.values = torch.zeros(4, 3), torch.zeros(4, 3)
    critic.returns = (hidden.detach() @ torch.tensor([1.0, -1.0, 0.5, 0.0])).clamp(-1, 1)
    optimizer, errors = torch.optim.Adam(critic.parameters(), 0.05), []
    for _ in range(150):
        critic.values = critic.head(hidden.detach()).squeeze(-1).detach()
        critic.signal(slice(0, 2), completions, hidden, ref_hidden, head)
        optimizer.step()
        optimizer.zero_grad()
        wrong = (critic.values - critic.returns)[completions.completion_mask]
        errors.append(wrong.square().mean().item())
    assert errors[-1] < 0.2 * errors[0] and hidden.grad is None


# ---- training


@pytest.mark.parametrize("objective", [*READS, *baselines.ORDERED])
def test_every_rival_trains(tmp_path_factory, tmp_path, script, objective):
    """One step of two updates on drawn clips moves the adapter and reports finite numbers."""
    drawn = tmp_path_factory.getbasetemp() / "rivals"
    sizes = "--num_train_clips 4 --num_eval_clips 2 --batch_prompts 8 --eval_samples 1 --lora_r 4".split()
    where = ["--policy", ROOT / "weights", "--world_dir", drawn, "--out", tmp_path / "run"]
    done = script(train.main, "train.py", *where, *sizes, "--num_steps", "1", "--objective", objective)
    assert done.returncode == 0, done.stderr
    row = json.loads((tmp_path / "run" / "metrics.jsonl").read_text())
    assert row["grad_norm"] > 0 and not row["bad"] and row["logprob_gap"] < 1e-4
    assert row["kl"] >= 0 and (objective in READS) == ("reward_discrete" in row)
    moved = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert max(x.abs().max() for name, x in moved.items() if "lora_B" in name) > 1e-4


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--objective", "ppo", "--swap_prob", "0.1"], ["ppo takes scores", "--oracle sum", "grpo_rank"]),
        (["--objective", "rloo", "--oracle", "lexicographic"], ["rloo takes scores", "grpo_rank"]),
        (["--objective", "ppo", "--oracle_asks", "pairs"], ["ppo takes scores", "no duels"]),
        (
            ["--objective", "grpo", "--oracle", "replay", "--oracle_cache", str(ROOT / "README.md")],
            ["grpo takes scores", "--oracle_asks scores"],  # a replayed judge's ranks hold none
        ),
        (["--objective", "grpo", "--position_bias", "0.1"], ["grpo takes scores", "swapped order"]),
        (["--objective", "dpo", "--anchor"], ["dpo", "--anchor", "grpo_rank"]),
        (["--objective", "dpo", "--oracle_agreement", "scale"], ["dpo", "--oracle_agreement scale"]),
        (["--objective", "best_of", "--norm", "token"], ["best_of", "--norm sequence"]),
        (["--objective", "grpo", "--gain", "appendix"], ["--gain appendix: is grpo_rank's"]),
        (["--objective", "best_of", "--beta", "3"], ["--beta 3.0: is dpo's"]),
    ],
)
def test_an_objective_that_cannot_use_the_feedback_is_refused_with_one_that_can(script, options, words):
    done = script(train.main, "train.py", *options)
    assert done.returncode == 2 and all(word in done.stderr for word in words), done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_resume_finds_the_critic_as_it_was():
    def learner(seed):
        model = torch.nn.ModuleDict({"q_proj": torch.nn.Linear(4, 4)})
        return lora.Learner(model, 2, 4.0, seed, baselines.Critic(4))

    first, second = learner(0), learner(1)
    for p in first.optimizer.param_groups[0]["params"]:
        p.grad = torch.ones_like(p)
    first.optimizer.param_groups[0]["lr"] = 0.1
    first.optimizer.step()
    second.restore({name: x.clone() for name, x in first.tensors().items()})
    assert (first.critic.head.weight != 0).all()
    for name, x in first.tensors().items():
        assert_close(second.tensors()[name], x, atol=0, rtol=0)


def test_a_resume_finds_the_critics_own_weights():
    model = torch.nn.ModuleDict({"q_proj": torch.nn.Linear(4, 4)})
    learner = lora.Learner(model, 2, 4.0, 0, baselines.Critic(4))
    learner.critic.head.weight.data.fill_(0.5)
    stored = {name: x.clone() for name, x in learner.tensors().items()}
    learner.critic.head.weight.data.zero_()
    learner.restore(stored)
    assert (learner.critic.head.weight == 0.5).all()


def test_the_critic_looks_back_with_the_score_at_the_last_token_less_kl_and_whitens(monkeypatch):
    """Values .1 and .2, one answer of three tokens with score 1, one of a single token with score -1."""
    mask = torch.tensor([[True, True, True], [True, False, False]])
    old, ref = torch.tensor([[-1.0, -1, -1], [-2, 0, 0]]), torch.tensor([[-3.0, -0.5, -1], [-2, 0, 0]])
    rollout = Completions(mask.long(), mask, old, None, mask[:, 0])
    policy = SimpleNamespace(decoder=SimpleNamespace(head=torch.zeros(5, 1)))
    states = torch.tensor([[[1.0], [2], [1]], [[2], [9], [9]]])
    monkeypatch.setattr(baselines, "completion_states", lambda *given: states)
    monkeypatch.setattr(baselines, "answer_logprobs", lambda *given: ref)
    critic = baselines.Critic(1)
    critic.head.weight.data.fill_(0.1)
    scores = torch.tensor([[1.0, -1.0]])
    critic.look_back(policy, [None], rollout, scores, [states], [slice(0, 1)], kl_coef=0.1)
    # the first token is 2 nats likelier than under the reference; the second, less likely, costs nothing
    to_come = torch.tensor([[1 - 0.2, 1, 1], [-1, 0, 0]])
    values = torch.tensor([[0.1, 0.2, 0.1], [0.2, 0, 0]])
    assert_close(critic.returns * mask, to_come)
    assert_close(critic.advantages, whitened(to_come - values, mask))
    assert critic.num_tokens == 4


def test_the_critics_loss_is_a_mean_over_the_tokens_of_the_step():
    critic, hidden = baselines.Critic(1), torch.ones(2, 2, 1)
    mask = torch.tensor([[True, True], [True, False]])
    part = SimpleNamespace(completion_mask=mask)
    critic.G, critic.num_tokens, critic.advantages = 2, 10, torch.zeros(2, 2)  # 7 tokens are elsewhere
    critic.values, critic.returns = torch.zeros(2, 2), torch.full((2, 2), 2.0)
    critic.signal(slice(0, 1), part, hidden, None, None)
    assert_close(critic.head.bias.grad.item(), baselines.VALUE_COEF * 3 * -2.0 / 10)
