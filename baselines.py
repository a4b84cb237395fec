"""The rivals of GRPO_rank (--objective): same rollouts, reference, LoRA, clip and loop, another signal.

By scores R, higher is better:
    grpo           A_i = (R_i - mean) / std                              arXiv:2402.03300      group_zscores
    dr_grpo        A_i = R_i - mean                                      arXiv:2503.20783      centred
    rloo           A_i = R_i - mean of the others                        arXiv:2402.14740      leave_one_out
    ppo            A_t by a value head and GAE, R and KL as rewards      arXiv:2402.03746      Critic
By the order, with w_i = beta (s_i - s_ref,i) and s = log pi(answer):
    dpo            -log sigma(w_best - w_worst)                          arXiv:2305.18290      dpo_loss
    plackett_luce  -sum_i log(exp w_i / sum of exp w_j, j = i or worse)  there, A.3    plackett_luce_loss
    best_of        -s_best / its tokens: cloning of the best answer                            best_of_loss

A loss of whole answers acts on the policy through its slope in each s_i, so its negative slope is an
advantage (`Ordered`), computed again at every update. Shape letters as in grpo_rank.py.
"""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from grpo_rank import Objective, Tokens, walk
from oracle import READS, Ranking
from plumbing.machine import reduce_sum
from plumbing.options import BadInput
from rollout import Completions, completion_states, micro_batches, rows_of

GAMMA, LAMBDA = 1.0, 1.0  # of GAE, as VLM-RLAIF has them
VALUE_CLIP, VALUE_COEF = 0.2, 0.1  # how far a value may move in a step; weight of the value head's loss


def check_objective(cfg) -> None:
    """Raises BadInput if the objective cannot use the feedback that the options choose. cfg: train.Config."""
    name, noisy = cfg.objective, cfg.swap_prob or cfg.position_bias
    for option in ("advantage_form", "gain"):
        if (value := getattr(cfg, option)) != getattr(type(cfg), option):
            raise BadInput(f"--{option} {value}: is grpo_rank's, not of --objective {name}; leave it out")
    if cfg.beta != type(cfg).beta and name not in ("dpo", "plackett_luce"):
        raise BadInput(f"--beta {cfg.beta}: is dpo's and plackett_luce's, not {name}'s; leave it out")
    gives_scores = cfg.oracle in ("rule", "sum", "trained") and cfg.oracle_asks == "lists"  # no duels
    scored = gives_scores or cfg.oracle_asks == "scores"
    if name in READS and (not scored or noisy or cfg.anchor or cfg.canary):
        wants = "--oracle sum | trained, or llm with --oracle_asks scores; no duels, swapped order or anchor"
        raise BadInput(f"--objective {name} takes scores: {wants}; choose these, or --objective grpo_rank")
    if name in ORDERED and (cfg.anchor or cfg.oracle_agreement == "scale"):
        option = "--anchor" if cfg.anchor else "--oracle_agreement scale"
        raise BadInput(f"--objective {name}: {option} shapes advantages; leave it out, or take grpo_rank")
    if name in ORDERED and cfg.norm != "sequence":
        raise BadInput(f"--objective {name} is a loss of whole answers: --norm sequence, not {cfg.norm}")


def rival(cfg, policy, learner, prompts, rollout, advantages, ranks, ref_states):
    """What gives `train.update` its signal, None if `advantages` do already; arguments as there."""
    if cfg.objective in ORDERED:
        return Ordered(cfg.objective, cfg.beta, ranks)
    if cfg.objective == "ppo":
        micro = micro_batches(len(ranks), cfg.micro_batch_prompts)
        learner.critic.look_back(policy, prompts, rollout, advantages, ref_states, micro, cfg.kl_coef)
        return learner.critic
    return None


# -------------------------------------------------------------------------------------------------- by scores


def centred(scores: Tensor) -> Tensor:
    """Dr. GRPO: R - mean of the group. (P, G) -> (P, G) float32. A tied group is exactly 0."""
    if scores.dim() != 2 or not scores.isfinite().all():
        raise ValueError(f"scores must be (P, G) and finite, got {tuple(scores.shape)}: {scores.tolist()}")
    scores = scores.double()
    tied = (scores == scores[:, :1]).all(dim=1, keepdim=True)
    return (scores - scores.mean(dim=1, keepdim=True)).masked_fill(tied, 0.0).float()


def leave_one_out(scores: Tensor) -> Tensor:
    """RLOO: R_i - mean of the other G - 1, which is G / (G - 1) times `centred`. (P, G) -> same, float32."""
    G = scores.shape[-1]
    return centred(scores) * (G / (G - 1))


def group_zscores(scores: Tensor, eps: float = 1e-6) -> Tensor:
    """GRPO: (R - mean) / (std + eps) of each group, std with ddof 1. (P, G) -> (P, G) float32; a group whose
    scores differ by no more than eps (rounding noise) is exactly 0."""
    deviation = centred(scores).double()
    tied = scores.amax(dim=1, keepdim=True) - scores.amin(dim=1, keepdim=True) <= eps
    std = scores.double().std(dim=1, keepdim=True)
    return (deviation / (std + eps)).masked_fill(tied, 0.0).float()


def advantages(objective: str, ranking: Ranking) -> Tensor:
    """(P, G) float32 of an objective that is not grpo_rank. ppo: the scores themselves, which `Critic`
    spreads over tokens. dpo, plackett_luce: those of a policy that is still its reference, for beta = 1."""
    if objective in READS:
        by = {"grpo": group_zscores, "dr_grpo": centred, "rloo": leave_one_out, "ppo": Tensor.float}
        return by[objective](ranking.scores)
    level = torch.zeros(ranking.ranks.shape, requires_grad=True)
    ORDERED[objective](level, ranking.ranks).sum().backward()
    return -level.grad


# --------------------------------------------------------------------------------------------- by the order


def dpo_loss(worths: Tensor, ranks: Tensor) -> Tensor:
    """-log sigma(w_best - w_worst), the mean over all pairs where several are best or worst; a group of one
    level is 0. worths (P, G) float, ranks (P, G) int64, 0 = best -> (P,)."""
    best, worst = ranks == 0, ranks == ranks.amax(dim=1, keepdim=True)
    pairs = best[:, :, None] & worst[:, None, :] & (ranks[:, :, None] < ranks[:, None, :])  # (P, G, G)
    losses = -F.logsigmoid(worths[:, :, None] - worths[:, None, :])
    return (losses * pairs).sum(dim=(1, 2)) / pairs.sum(dim=(1, 2)).clamp(min=1)


def plackett_luce_loss(worths: Tensor, ranks: Tensor) -> Tensor:
    """Negative log-likelihood of the order: each answer is chosen among itself and all that are ranked below
    it, so tied answers do not compete. worths (P, G), ranks (P, G) int64 -> (P,)."""
    below = ranks[:, :, None] < ranks[:, None, :]  # (P, G, G): i is better than j
    rivals = below | torch.eye(ranks.shape[1], dtype=torch.bool, device=ranks.device)
    everyone = worths[:, None, :].expand_as(rivals).masked_fill(~rivals, -torch.inf)
    return (everyone.logsumexp(dim=2) - worths).sum(dim=1)


def best_of_loss(logprobs: Tensor, ranks: Tensor) -> Tensor:
    """-log pi of the best answer, the mean where several are best; a group of one level is 0. (P, G) -> (P,).
    logprobs: of a token on average, so that a long answer counts as much as a short one."""
    best = (ranks == 0) & (ranks != 0).any(dim=1, keepdim=True)
    return -(logprobs * best).sum(dim=1) / best.sum(dim=1).clamp(min=1)


ORDERED = {"dpo": dpo_loss, "plackett_luce": plackett_luce_loss, "best_of": best_of_loss}


@torch.no_grad()
def answer_logprobs(hidden: Tensor, head: Tensor, completions: Completions) -> Tensor:
    """(B, T) float32 log-probabilities of the tokens, 0 outside the mask, from states hidden (B, T, D)."""
    mask, found = completions.completion_mask, torch.zeros_like(completions.logprobs)
    ids = completions.completion_ids[mask]
    nothing = torch.zeros(len(ids), device=hidden.device)
    support = None if completions.support is None else completions.support[mask]
    tokens = Tokens(ids, nothing, nothing, nothing, support)
    sampling = completions.temperature, completions.banned
    found[mask] = walk(hidden[mask], None, head, tokens, Objective(), *sampling)[0][0]
    return found


class Ordered:
    """A loss of whole answers in the place of GRPO_rank's advantages.

    beta: weight of the difference from the reference in a worth, of dpo and plackett_luce. ranks (P, G)."""

    def __init__(self, objective: str, beta: float, ranks: Tensor):
        self.objective, self.beta, self.ranks = objective, beta, ranks

    def signal(self, prompts: slice, part: Completions, hidden: Tensor, ref_hidden: Tensor, head: Tensor):
        """(completions, advantages (b * G,)) for `rollout_loss` with norm sequence, at the policy as it is.

        The completions come with today's log-probabilities as the old ones: the ratio is 1, and nothing is
        clipped. With -A_i / (tokens_i * b * G) = the loss's slope in s_i, both losses have one gradient.
        """
        ranks, lengths = self.ranks[prompts].to(hidden.device), part.completion_mask.sum(dim=1).clamp(min=1)
        now = answer_logprobs(hidden.detach(), head, part)
        sums = now.sum(dim=1).requires_grad_()
        if self.objective == "best_of":
            worths = sums / lengths
        else:
            worths = self.beta * (sums - answer_logprobs(ref_hidden, head, part).sum(dim=1))
        with torch.enable_grad():
            ORDERED[self.objective](worths.view(ranks.shape), ranks).sum().backward()
        return replace(part, logprobs=now), -sums.grad * lengths * ranks.shape[1]


# -------------------------------------------------------------------------------------------------- ppo


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float = GAMMA, lam: float = LAMBDA) -> Tensor:
    """Generalised advantage estimation (arXiv:1506.02438). All (B, T), padded on the right -> (B, T) float32.

    A_t = delta_t + gamma lam A_t+1, delta_t = r_t + gamma V_t+1 - V_t; V behind the last token is 0.
    """
    values, found = values * mask, torch.zeros_like(values)
    later = advantage = torch.zeros_like(values[:, 0])
    for t in reversed(range(values.shape[1])):
        advantage = (rewards[:, t] + gamma * later - values[:, t] + gamma * lam * advantage) * mask[:, t]
        later, found[:, t] = values[:, t], advantage
    return found


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, clip: float = VALUE_CLIP) -> Tensor:
    """1/2 max((V - R)^2, (clip(V, V_old +- clip) - R)^2) of each token, any shape -> same."""
    clipped = old_values + (values - old_values).clamp(-clip, clip)
    return 0.5 * torch.maximum((values - returns) ** 2, (clipped - returns) ** 2)


class Critic(nn.Module):
    """PPO with a reward model's scalar: a value of each token, and advantages by GAE.

    Differs from VLM-RLAIF: the value is one linear layer, zero at first, on the policy's own states, which it
    does not change; there it is a second model with an adapter of its own. The score stands at the answer's
    last token, where theirs stands in the last slot of a window of 896, and is not multiplied by 10.
    As there: KL log pi - log pi_ref of each sampled token, where positive, is taken off the rewards and is
    not in the loss; advantages are whitened over the step; gamma = lambda = 1.
    """

    def __init__(self, width: int):
        super().__init__()
        self.head = nn.Linear(width, 1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    @torch.no_grad()
    def look_back(self, policy, prompts, rollout: Completions, scores: Tensor, ref_states, micro, kl_coef):
        """Before the updates: values, returns and whitened advantages of a rollout. scores (P, G)."""
        self.G, head, device = scores.shape[1], policy.decoder.head.float(), rollout.logprobs.device
        mask, self.values = rollout.completion_mask, torch.zeros_like(rollout.logprobs)
        rewards = torch.zeros_like(rollout.logprobs)
        for p, ref_hidden in zip(micro, ref_states, strict=True):
            rows = rows_of(p, self.G)
            part = rollout[rows]
            self.values[rows] = self.head(completion_states(policy, prompts[p], part).float()).squeeze(-1)
            apart = part.logprobs - answer_logprobs(ref_hidden.to(device), head, part)
            rewards[rows] = -kl_coef * apart.clamp(min=0) * part.completion_mask
        last = mask.sum(dim=1, keepdim=True).clamp(min=1) - 1
        rewards.scatter_add_(1, last, scores.flatten()[:, None].to(rewards))
        found = gae(rewards, self.values, mask)
        self.returns, self.advantages = found + self.values, whitened(found, mask)
        self.num_tokens = reduce_sum(mask.sum(), device=device)[0]

    def signal(self, prompts: slice, part: Completions, hidden: Tensor, ref_hidden: Tensor, head: Tensor):
        """(completions, advantages (b * G, T)); adds the gradient of the value head's loss to the head."""
        rows, mask = rows_of(prompts, self.G), part.completion_mask
        values = self.head(hidden.detach().float()).squeeze(-1)
        losses = value_loss(values, self.values[rows], self.returns[rows]) * mask
        (VALUE_COEF * losses.sum() / max(self.num_tokens, 1)).backward()
        return part, self.advantages[rows]


def whitened(values: Tensor, mask: Tensor) -> Tensor:
    """To mean 0 and standard deviation 1 over the step's tokens, of all processes. (B, T) -> (B, T)."""
    values, count = values * mask, mask.sum()
    count, total, squares = reduce_sum(count, values.sum(), (values**2).sum(), device=values.device)
    mean = total / max(count, 1)
    std = max(squares / max(count, 1) - mean**2, 0.0) ** 0.5
    return (values - mean) * mask / (std + 1e-8)
