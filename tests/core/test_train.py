"""The loop as its users meet it: whole runs of train.py on tiny models and clips, in processes of their own
where they are killed, or are several."""

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

import eval as evaluation
import lora
import train
from checkpoints.policies import load_model, save_model
from data import Prompts
from oracle import Ranking
from rollout import Sampling, answer, generate
from videoqa import world

ROOT = Path(__file__).parents[2]
SMALL = "--num_train_clips 6 --num_eval_clips 3 --batch_prompts 8".split()
SMALL += "--eval_samples 1 --save_every 2 --lora_r 4".split()


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with the drawn clips; the policy is the repository's own supervised start."""
    folder = tmp_path_factory.mktemp("train")
    world.make_world(folder / "world" / "train6", range(1_000_000, 1_000_006))
    world.make_world(folder / "world" / "eval3", range(2_000_000, 2_000_003))
    return folder


def command(home, out, *options):
    where = ["--policy", ROOT / "weights", "--world_dir", home / "world", "--out", home / out]
    where += ["--dtype", "float32"]
    return [str(x) for x in (ROOT / "train.py", *where, *SMALL, *options)]


ALONE = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}  # a process of its own


def adapter(home, out):
    return load_file(home / out / "adapter" / "adapter_model.safetensors")


def metrics(home, out):
    """Rows of metrics.jsonl without what depends on the clock."""
    rows = [json.loads(line) for line in (home / out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.endswith(("_s", "oracle_share"))} for row in rows]


@pytest.fixture(scope="module")
def straight(home, script):
    """Four steps without a break."""
    done = script(train.main, *command(home, "straight", "--num_steps", "4"))
    assert done.returncode == 0, done.stderr
    return done


def wait_for_rows(path, count, process):
    for _ in range(6000):  # five minutes: a busy machine is no failure
        if path.exists() and len(path.read_text().splitlines()) >= count:
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    raise AssertionError(f"{path} never had {count} rows")


def test_a_run_writes_what_the_design_promises(home, straight):
    folder = home / "straight"
    results = json.loads((folder / "results.json").read_text())
    assert {"seed", "steps", "wall_s", "device", "before", "after"} <= results.keys()
    for when in ("before", "after"):
        for mode in ("greedy", "sampled"):
            part = results[when][mode]
            assert 0 <= part["ci95"][0] <= part["accuracy"] <= part["ci95"][1] <= 1
            assert sum(c["n"] for c in part["by_category"].values()) == part["n"]
    assert len(metrics(home, "straight")) == 4
    row = json.loads((folder / "rollouts.jsonl").read_text().splitlines()[0])
    assert len(row["candidates"]) == len(row["oracle_ranks"]) == len(row["advantages"]) == 5
    assert any(t.abs().max() > 0 for key, t in adapter(home, "straight").items() if "lora_B" in key)
    assert not list(folder.rglob("*.tmp"))


def test_rollout_and_training_logprobs_agree_in_every_step(home, straight):
    assert max(row["logprob_gap"] for row in metrics(home, "straight")) < 1e-4


def test_killed_after_two_steps_and_resumed_is_bit_for_bit_the_straight_run(home, straight, script):
    words = [sys.executable, *command(home, "killed", "--num_steps", "4")]
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=ALONE)
    wait_for_rows(home / "killed" / "metrics.jsonl", 3, process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = script(train.main, *command(home, "killed", "--resume"))
    assert done.returncode == 0, done.stderr
    assert metrics(home, "killed") == metrics(home, "straight")
    for key, tensor in adapter(home, "straight").items():
        assert torch.equal(tensor, adapter(home, "killed")[key]), key


def test_ctrl_c_saves_says_how_to_go_on_and_the_run_can_go_on(home, script):
    words = [sys.executable, *command(home, "stopped", "--num_steps", "500")]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ALONE)
    wait_for_rows(home / "stopped" / "metrics.jsonl", 1, process)
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=60)
    steps = len(metrics(home, "stopped"))
    assert process.returncode == 1 and "--resume" in told
    done = script(train.main, *command(home, "stopped", "--resume", "--num_steps", steps + 1))
    assert done.returncode == 0, done.stderr
    assert len(metrics(home, "stopped")) == steps + 1


def test_two_processes_make_the_update_of_one(home, straight):
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2")
    words = [*torchrun, *command(home, "two", "--num_steps", "4")]
    done = subprocess.run(words, capture_output=True, text=True, env=ALONE)
    assert done.returncode == 0, done.stderr
    for one, two in zip(metrics(home, "straight"), metrics(home, "two"), strict=True):
        assert one.keys() == two.keys()
        assert one["tokens"] == two["tokens"] and one["dead_groups"] == two["dead_groups"]
        for key in ("accuracy", "kl", "entropy", "loss", "grad_norm", "ndcg"):
            assert two[key] == pytest.approx(one[key], rel=1e-3, abs=1e-6), key
    for key, tensor in adapter(home, "straight").items():
        torch.testing.assert_close(adapter(home, "two")[key], tensor, atol=2e-5, rtol=0, msg=key)


# ------------------------------------------------------------------------------------------------- one update


@pytest.fixture
def small_step(home):
    """A learner, and an update's arguments: 4 prompts of 5 sampled completions and their advantages."""
    cfg = train.Config(
        updates_per_rollout=1, entropy_coef=0.01, max_grad_norm=1e9, lora_r=4, lora_alpha=8.0, num_steps=1
    )
    policy = load_model(ROOT / "weights")
    learner = lora.Learner(policy.decoder, cfg.lora_r, cfg.lora_alpha)
    trainable = learner.optimizer.param_groups[0]["params"]
    learner.optimizer = torch.optim.SGD(trainable, lr=1.0)
    for p in trainable:  # B = 0 would hide half of the gradients
        p.data += 0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(2))
    g = torch.Generator().manual_seed(3)
    prompts = Prompts(torch.randint(4, 200, (4, 40), generator=g), torch.ones(4, 40, dtype=torch.bool),
                      torch.randn(4, 32, 128, generator=g))  # fmt: skip
    uniforms = torch.rand(4, 5, 6, generator=g)
    rollout = generate(policy, prompts, 5, Sampling(6, torch.arange(150, 300)), uniforms)
    return cfg, policy, learner, prompts, rollout, torch.randn(4, 5, generator=g)


def update(cfg, policy, learner, prompts, rollout, advantages):
    """One update at rate cfg.lr; (its numbers, the change of all adapters)."""
    trainable = learner.optimizer.param_groups[0]["params"]
    start = [p.detach().clone() for p in trainable]
    states = train.reference_states(policy, prompts, rollout, cfg.micro_batch_prompts)
    batch = dict(prompts=prompts, rollout=rollout, advantages=advantages)
    numbers = train.update(cfg, policy, learner, ref_states=states, step=0, **batch)
    change = torch.cat([(p - s).detach().flatten() for p, s in zip(trainable, start, strict=True)])
    for p, value in zip(trainable, start, strict=True):
        p.data.copy_(value)
    return numbers, change


@pytest.mark.parametrize("norm", ["sequence", "token", "constant"])
def test_gradient_accumulation_cannot_change_the_update(small_step, norm):
    cfg, *batch = small_step
    cfg.norm, cfg.lr, changes = norm, 1.0, []
    for cfg.micro_batch_prompts in (0, 1):
        changes.append(update(cfg, *batch)[1])
    assert changes[0].abs().max() > 1e-4
    # float32 rounds differently on every CPU (1.2e-7 with AVX-512); dividing by a micro-batch's counts: > 0.5
    torch.testing.assert_close(changes[0], changes[1], atol=1e-6, rtol=1e-4)


def test_the_first_update_has_ratio_one_and_no_kl(small_step):
    cfg, policy, learner, *batch = small_step
    lora.freeze_reference(policy.decoder)
    numbers, _ = update(cfg, policy, learner, *batch)
    assert numbers["ratio"] == pytest.approx(1, abs=1e-5) and numbers["kl"] == pytest.approx(0, abs=1e-6)
    assert numbers["clip_frac"] == 0 and numbers["logprob_gap"] < 1e-4 and numbers["grad_norm"] > 1e-4


def test_a_process_without_a_live_group_takes_part_with_a_gradient_of_zero(small_step):
    cfg, policy, learner, prompts, rollout, advantages = small_step
    nothing = torch.zeros(4, dtype=torch.bool)
    numbers, change = update(
        cfg, policy, learner, prompts[nothing], rollout.of_prompts(nothing), advantages[nothing]
    )
    assert change.eq(0).all() and numbers["loss"] == 0 and numbers["grad_norm"] == 0
    assert numbers["kl"] is None and numbers["entropy"] is None  # absent, not 0


def test_dead_and_failed_groups_are_decided_in_one_place():
    ranks = torch.tensor([[0, 0, 0], [0, 1, 2], [0, 1, 2], [0, 0, 2]])
    ranking = Ranking(ranks, torch.tensor([True, True, False, True]), [""] * 4)
    assert ranking.live.tolist() == [False, True, False, True]


def test_a_non_finite_loss_changes_nothing_and_says_so(small_step, monkeypatch):
    cfg, *batch = small_step
    real = train.rollout_loss

    def broken(*args, **options):
        loss, stats = real(*args, **options)
        return loss * float("nan"), stats

    monkeypatch.setattr(train, "rollout_loss", broken)
    numbers, change = update(cfg, *batch)
    assert numbers["bad"] and change.eq(0).all()


def test_a_run_of_non_finite_losses_skips_saves_counts_and_stops(home, script):
    done = script(train.main, *command(home, "nan", "--num_steps", "20", "--kl_coef", "1e30"))
    assert done.returncode == 1 and "3 non-finite losses in a row" in done.stderr
    assert [row["bad"] for row in metrics(home, "nan")] == [True] * 3
    batches = sorted((home / "nan" / "bad_batches").iterdir())
    assert len(batches) == 3 and "completion_ids" in load_file(batches[0])
    assert all(t.abs().max() == 0 for key, t in adapter(home, "nan").items() if "lora_B" in key)


def test_a_run_without_any_order_of_answers_ends_well_and_says_what_helps(home, script):
    """Cold sampling gives five equal answers: every group is dead, in every step."""
    done = script(train.main, *command(home, "dead", "--num_steps", "2", "--temperature", "0.001"))
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("--temperature and --group_size") == 1
    assert [(row["kl"], row["dead_groups"]) for row in metrics(home, "dead")] == [(None, 8)] * 2
    assert "16 groups of answers: 16 tied throughout, 0 not ranked" in done.stdout


def test_held_out_questions_on_videos_of_the_training_are_told(home, straight, script):
    clips = str(home / "world" / "train6")
    options = ["--data", f"{clips}/questions.jsonl", "--videos", clips, "--num_steps", "1"]
    options += ["--eval_data", f"{clips}/questions.jsonl"]
    done = script(train.main, *command(home, "leaky", *options))
    assert done.returncode == 0 and "6 videos are in both sets:" in done.stdout
    assert "are in both" not in straight.stdout


# -------------------------------------------------------------------------------------------------- bad input


def write_lines(path, *lines):
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--learning_rate", "1"], ["--learning_rate", "--help"]),
        (["--num_step", "1"], ["--num_step"]),  # no abbreviations
        (["--num_steps", "many"], ["--num_steps", "many"]),
        (["--group_size", "1"], ["--group_size 1", "at least 2"]),
        (["--advantage_form", "best"], ["--advantage_form best", "ideal"]),
        (["--data", "x.jsonl"], ["--videos"]),
        (["--data", "{home}/none.jsonl", "--videos", "{home}"], ["none.jsonl"]),
        (["--data", "{home}/bad.jsonl", "--videos", "{home}"], ["bad.jsonl", "2", "answer"]),
        (["--data", "{home}/novideo.jsonl", "--videos", "{home}"], ["missing.mp4", "no such file"]),
        (["--policy", "{home}/pickled"], ["model.safetensors", "pytorch_model.bin", "safetensors"]),
        (["--policy", "{home}/misfit"], ["misfit", "config.json"]),
        (["--objective", "grpo", "--canary"], ["--objective grpo", "--oracle sum", "grpo_rank"]),
        (["--resume"], ["config.json", "--resume"]),
        (["--group_size", str(10**20)], ["--group_size 1000", "at most"]),
        (["--num_frames", "1000000000"], ["--num_frames 1000000000", "at most 4096"]),
        (["--adapter", "a\udcff"], ["--adapter", "not a text in UTF-8"]),
        # what would do nothing beside what was chosen
        (["--oracle_url", "http://127.0.0.1:9/v1"], ["--oracle_url http", "needs --oracle llm"]),
        (["--oracle_gold"], ["--oracle_gold True: needs --oracle llm"]),
        (["--ranker_margin", "3"], ["--ranker_margin 3.0: needs --oracle trained"]),
        (["--eval_videos", "{home}"], ["--eval_videos", "needs --eval_data"]),
        (["--data", "x.jsonl", "--videos", "{home}", "--world", "hard"], ["--world hard", "--data"]),
    ],
)
def test_bad_input_is_one_line_that_names_it_status_2_and_nothing_written(home, script, options, words):
    write_lines(home / "bad.jsonl", '{"id": "a", "video": "a.mp4", "question": "q", "answer": "x"}',
                '{"id": "b", "video": "a.mp4", "question": "q"}')  # fmt: skip
    rows = [
        json.dumps({"id": str(i), "video": f"{i}missing.mp4", "question": "q", "answer": "x"})
        for i in range(2)
    ]
    write_lines(home / "novideo.jsonl", *rows)
    (home / "pickled").mkdir(exist_ok=True)
    (home / "pickled" / "config.json").write_text((ROOT / "weights" / "config.json").read_text())
    (home / "pickled" / "pytorch_model.bin").write_bytes(b"\x80")
    if not (home / "misfit").exists():
        save_model(load_model(ROOT / "weights"), home / "misfit")
        sizes = json.loads((ROOT / "weights" / "config.json").read_text())
        sizes["model"]["ffn_dim"] = 64
        (home / "misfit" / "config.json").write_text(json.dumps(sizes))
    ended = script(train.main, *command(home, "refused", *(o.format(home=home) for o in options)))
    told = ended.stderr.replace("\r", "\n")
    lines = [line for line in told.splitlines() if line.startswith("error:")]
    assert ended.returncode == 2 and len(lines) == 1 and all(word in lines[0] for word in words), told
    assert "Traceback" not in told and not (home / "refused").exists()


def test_an_existing_run_folder_and_other_options_on_resume_are_refused(home, straight, script):
    again = script(train.main, *command(home, "straight"))
    assert again.returncode == 2 and "exists already" in again.stderr and "--resume" in again.stderr
    changed = script(train.main, *command(home, "straight", "--resume", "--lr", "0.5"))
    assert changed.returncode == 2 and "--lr 0.5" in changed.stderr


def test_a_short_run_on_ranks_alone_learns(home, script):
    """Sampled accuracy on held-out clips rises: the interval of the paired gain is above 3 points."""
    options = "--num_steps 16 --num_train_clips 60 --num_eval_clips 40 --batch_prompts 32 --save_every 100"
    done = script(train.main, *command(home, "learns", *options.split(), "--lora_r", "16"))
    assert done.returncode == 0, done.stderr
    gain = json.loads((home / "learns" / "results.json").read_text())["gain"]
    assert gain["sampled"]["ci95"][0] > 0.03, gain


@pytest.mark.parametrize("options", [["--objective", "grpo"], ["--oracle", "lexicographic"]])
def test_both_objectives_train_on_the_dual_reward_and_log_its_parts_apart(home, script, options):
    out = "dual" + options[1]
    done = script(train.main, *command(home, out, "--num_steps", "1", *options))
    assert done.returncode == 0, done.stderr
    row = metrics(home, out)[0]
    assert all(0 <= row[f"reward_{part}"] <= 1 for part in ("discrete", "continuous", "format"))
    assert row["loss"] is not None and row["grad_norm"] > 0


@pytest.mark.parametrize("options", [["--keep", "best"], ["--stop_after", "2"]])
def test_choosing_among_evaluations_needs_evaluations(home, script, options):
    done = script(train.main, *command(home, "none", *options))
    assert done.returncode == 2 and "--eval_every" in done.stderr and not (home / "none").exists()


def test_a_run_that_gets_no_better_stops_early_and_can_be_told_to_go_on(home, script):
    """At this rate nothing changes, so that the evaluation before the first step stays the best."""
    options = ["--num_steps", "4", "--lr", "1e-9", "--eval_every", "1", "--eval_subset", "4"]
    stop, again = ["--stop_after", "2"], command(home, "early", "--resume")
    said = "stopped at step 2 (--stop_after): step 0 was the best evaluated"
    for start in (command(home, "early", *options, *stop), again):
        done = script(train.main, *start)
        assert done.returncode == 0 and done.stderr.count(said) == 1, done.stderr
        assert json.loads((home / "early" / "results.json").read_text())["steps"] == 2
    done = script(train.main, *again, "--stop_after", "0")
    assert done.returncode == 0 and said not in done.stderr
    assert json.loads((home / "early" / "results.json").read_text())["steps"] == 4


def wrong_first(question, texts, *, video, reference):
    return [int(text == reference) for text in texts]


def test_a_policy_that_games_its_oracle_is_seen_at_the_first_evaluation(home, script):
    """The oracle puts wrong answers first. Its own numbers are as good as any oracle's."""
    options = ["--oracle", "test_train:wrong_first", "--lr", "0.01", "--num_eval_clips", "12"]
    options += ["--num_steps", "3", "--eval_every", "3"]
    done = script(train.main, *command(home, "gamed", *options))
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("evaluated at step")]
    assert len(lines) == 2 and "WARNING" not in lines[0], lines
    fallen = re.search(r"WARNING, fell: (.+ 100\.0 -> \d+\.\d %.*); does the oracle reward", lines[1])
    first, second = (json.loads(x) for x in (home / "gamed" / "evaluations.jsonl").read_text().splitlines())
    changes = {
        name: second["greedy"]["by_category"][name]["accuracy"] - row["accuracy"]
        for name, row in first["greedy"]["by_category"].items()
    }
    assert fallen and fallen[1].startswith(min(changes, key=changes.get)) and min(changes.values()) < -0.5


def test_tensorboard_gets_the_numbers_or_its_absence_is_one_line(home, script):
    done = script(train.main, *command(home, "board", "--num_steps", "1", "--tensorboard"))
    if importlib.util.find_spec("tensorboard"):
        assert done.returncode == 0 and list((home / "board" / "tensorboard").iterdir()), done.stderr
    else:
        assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
        assert "pip install tensorboard" in done.stderr


def test_a_killed_first_evaluation_goes_on_and_a_new_start_does_not(home, script, monkeypatch):
    asked = []

    def count(policy, questions, rows, *rest):
        asked.append(len(rows))
        if len(asked) == 3:
            raise KeyError("killed")
        return answer(policy, questions, rows, *rest)

    monkeypatch.setattr(evaluation, "answer", count)
    monkeypatch.setattr(evaluation, "EVALUATED_AT_ONCE", 10)
    start = command(home, "first", "--num_steps", "1")
    with pytest.raises(KeyError):
        script(train.main, *start)
    assert len((home / "first" / "answers.jsonl").read_text().splitlines()) == 20
    done = script(train.main, *start, "--resume")
    assert done.returncode == 0, done.stderr
    n = json.loads((home / "first" / "results.json").read_text())["before"]["greedy"]["n"]
    assert sum(asked[3:]) == (n - 20) + n  # before, and after
    path = home / "first" / "answers.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows = [row | {"sampled": []} if i < 3 else row for i, row in enumerate(rows) if row["step"] == 0]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    os.remove(home / "first" / "checkpoint.safetensors")
    asked[:] = [0] * 3
    done = script(train.main, *start, "--resume")  # rows of too few draws are asked anew
    assert done.returncode == 0 and sum(asked) == 3 + n, done.stderr
    os.remove(home / "first" / "checkpoint.safetensors")
    asked[:] = [0] * 3
    done = script(train.main, *start)
    assert done.returncode == 0 and sum(asked) == 2 * n, done.stderr


def test_advantages_have_the_form_the_gain_and_the_weights_that_are_asked_for():
    ranks, policy_ranks = torch.tensor([[0, 1, 2]]), torch.tensor([[2, 0, 1]])
    ranking = Ranking(
        ranks, agreement=torch.tensor([0.25]), below_anchor=torch.tensor([[True, False, False]])
    )
    for form in ("ideal", "printed", "inverted"):
        for gain in ("divided", "appendix"):
            cfg = train.Config(advantage_form=form, gain=gain)
            wanted = train.rank_advantages(ranks, policy_ranks, form, gain) / 4
            wanted[0, 0] = wanted[0, 0].clamp(max=0)
            assert train.advantages_of(cfg, ranking, policy_ranks).equal(wanted)


def test_an_update_has_the_objective_of_the_options_and_a_rate_that_falls_to_zero(small_step, monkeypatch):
    cfg, policy, learner, prompts, rollout, advantages = small_step
    cfg.clip_eps, cfg.kl_coef, cfg.num_steps, cfg.lr, cfg.updates_per_rollout = 0.3, 0.5, 4, 8.0, 2
    seen, rates, real = [], [], train.rollout_loss
    monkeypatch.setattr(train, "rollout_loss", lambda *x, **more: seen.append(x[4]) or real(*x, **more))
    monkeypatch.setattr(train, "optimizer_step", lambda optimizer, lr, norm: rates.append((lr, norm)) or 1.0)
    states = train.reference_states(policy, prompts, rollout, 0)
    batch = dict(prompts=prompts, rollout=rollout, advantages=advantages, ref_states=states)
    numbers = [train.update(cfg, policy, learner, step=step, **batch) for step in (0, 3)]
    assert rates == [(8.0, 1e9)] * 2 + [(2.0, 1e9)] * 2
    assert set(seen) == {train.Objective(0.3, "sequence", cfg.max_new_tokens, 0.5, 0.01)} and len(seen) == 4
    hidden = train.completion_states(policy, prompts, rollout)
    loss, _ = real(hidden, policy.decoder.head, rollout, advantages.flatten(), seen[0], ref_hidden=states[0])
    assert [row["loss"] for row in numbers] == pytest.approx([loss.item()] * 2)  # the mean of two alike


def test_the_reference_is_frozen_as_each_epoch_begins_and_a_step_asks_no_more_than_it_needs(monkeypatch):
    frozen, attempts = [], []

    class Enough(Exception):
        pass

    class Groups:
        def __init__(self, *given):
            pass

        def after(self, earlier):
            return self

        def fill(self, P):
            return len(attempts) == 2

        @property
        def ranking(self):
            raise Enough

    fake = SimpleNamespace
    ranking = fake(dead="")
    batches = fake(steps_an_epoch=3, fill=4, P=1, asked=fake(questions=[]),
                   of_step=lambda step, G, T, attempt: attempts.append(attempt) or ([], None))  # fmt: skip
    monkeypatch.setattr(train, "answer", lambda *given: (None, None))
    monkeypatch.setattr(train, "steady_products", lambda decoder: nullcontext())
    monkeypatch.setattr(train, "Groups", Groups)
    monkeypatch.setattr(train, "freeze_reference", lambda decoder: frozen.append(step))
    for step in range(8):
        attempts.clear()
        run = fake(
            steps=lambda n, step=step: [step], clock=lambda name: nullcontext(), stop_if=lambda dead: None
        )
        oracle = fake(rank=lambda *given: ranking)
        with pytest.raises(Enough):
            train.learn(train.Config(), fake(decoder=None), None, oracle, batches, None, run)
        assert attempts == [0, 1]
    assert frozen == [0, 3, 6]


def test_the_policys_ranks_are_by_the_summed_log_probability_of_each_answer_highest_first(monkeypatch):
    class Enough(Exception):
        pass

    fake = SimpleNamespace
    logprobs = torch.tensor([[-3.0, 0.0], [-1.0, -1.0], [-0.5, 0.0], [-9.0, 0.0]])  # P = G = 2
    groups = fake(ranking=None, rollout=fake(logprobs=logprobs), fill=lambda P: True)
    groups.after = lambda earlier: groups

    def advantages_of(cfg, ranking, policy_ranks):
        assert policy_ranks.tolist() == [[1, 0], [0, 1]]
        raise Enough

    batches = fake(steps_an_epoch=1, fill=1, P=2, asked=fake(questions=[]), of_step=lambda *given: ([], None))
    stubs = dict(
        answer=lambda *given: (None, None), steady_products=lambda decoder: nullcontext(),
        Groups=lambda *given: groups, freeze_reference=lambda decoder: None, advantages_of=advantages_of,
    )  # fmt: skip
    for name, stub in stubs.items():
        monkeypatch.setattr(train, name, stub)
    run = fake(steps=lambda n: [0], clock=lambda name: nullcontext(), stop_if=lambda dead: None)
    oracle = fake(rank=lambda *given: fake(dead=""))
    with pytest.raises(Enough):
        train.learn(train.Config(group_size=2), fake(decoder=None), None, oracle, batches, None, run)


def test_ppo_has_the_kl_in_its_rewards_and_not_in_its_loss_as_well(small_step, monkeypatch):
    cfg, *batch = small_step
    kept = SimpleNamespace(signal=lambda p, part, *states: (part, torch.zeros(len(part.ended))))
    monkeypatch.setattr(train, "rivals", lambda: SimpleNamespace(rival=lambda *given: kept))
    real, seen = train.rollout_loss, []

    def rollout_loss(hidden, head, part, signal, objective, **more):
        seen.append(objective.kl_coef)
        return real(hidden, head, part, signal, objective, **more)

    monkeypatch.setattr(train, "rollout_loss", rollout_loss)
    for cfg.objective in ("grpo_rank", "ppo", "grpo"):
        update(cfg, *batch)
    assert seen == [0.02, 0.0, 0.02]


def test_the_options_of_sampling_and_of_the_adapter_reach_them(home, script, monkeypatch):
    seen, of, Learner = {}, train.Sampling.of, train.Learner
    monkeypatch.setattr(
        train.Sampling, "of", lambda *given, **chosen: seen.update(chosen) or of(*given, **chosen)
    )
    monkeypatch.setattr(train, "Learner", lambda *given: seen.update(learner=given[1:4]) or Learner(*given))
    options = "--num_steps 1 --top_p 0.5 --temperature 0.7 --max_new_tokens 4 --sample_prompts 3".split()
    done = script(train.main, *command(home, "reached", *options, "--seed", "9", "--lora_alpha", "5"))
    assert done.returncode == 0, done.stderr
    wanted = dict(top_p=0.5, temperature=0.7, max_new_tokens=4, prompts_at_once=3)
    assert {name: seen[name] for name in wanted} == wanted and seen["learner"][1:] == (5.0, 9)
