"""What comes from outside and is damaged ends in one line that names the file, the row or the option."""

import dataclasses
import json
import math
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import get_args

import pytest
import torch
from safetensors.torch import load_file, save_file

import ask
import eval as evaluation
import lora
import pretrain
import selection
import train
from checkpoints import embedded, weight_files
from checkpoints.huggingface import decoder_config, hf_config
from checkpoints.peft_files import read_adapter
from checkpoints.policies import PolicyOptions, load_policy, load_run
from checkpoints.pretrained import llava_configs
from checkpoints.supervised import check_out, decoder_options, load_supervised, load_training, take_bridge
from checkpoints.word_tokenizer import WordTokenizer
from clip import ClipConfig
from data import Prompts
from experiments import tour
from model import ModelConfig, VideoLM
from oracle import load_function
from oracles.pairs import load_pairs
from oracles.ranker import TrainedOracle, load_ranker
from plumbing.options import BadInput, Bounds, Seed, check_record, checked, run_script
from plumbing.progress import compare
from plumbing.run_folder import Kept, RunFolder, cut_back, stored_options
from rollout import Sampling, generate
from videoqa import questions
from videoqa.answers import Question
from videoqa.datasets import convert

WEIGHTS = Path(__file__).parents[2] / "weights"
TINY = ModelConfig(vocab_size=16, dim=16, num_layers=1, ffn_dim=16, num_queries=8, qformer_layers=1)
CLIP = ClipConfig(image_size=16, patch_size=8, width=16, num_layers=1, text_layers=1, vocab_size=16)


def spoilt(path, value):
    """Puts the value into the last tensor of a safetensors file."""
    tensors = load_file(path)
    next(reversed(tensors.values())).view(-1)[0] = value
    save_file(tensors, path)


# ---- numbers that are none


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_no_reader_of_weights_takes_a_number_that_is_not_finite(tmp_path, value):
    policy, adapter, bridge = tmp_path / "w", tmp_path / "adapter", tmp_path / "bridge"
    shutil.copytree(WEIGHTS, policy)
    spoilt(policy / "model.safetensors", value)
    spoilt(policy / "ranker" / "ranker.safetensors", value)
    for folder in (adapter, bridge):
        folder.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    (bridge / "config.json").write_text('{"model_type": "supervised_policy", "sizes": {}}')
    for path in (adapter / "adapter_model.safetensors", bridge / "bridge.safetensors"):
        save_file({"x": torch.tensor([1.0, value])}, path)
    readers = {
        "model.safetensors": lambda: load_policy(PolicyOptions(policy=str(policy))),
        "ranker.safetensors": lambda: load_ranker(str(policy / "ranker")),
        "adapter_model.safetensors": lambda: read_adapter(str(adapter)),
        "bridge.safetensors": lambda: take_bridge(VideoLM(TINY, CLIP), str(bridge)),
    }
    for name, read in readers.items():
        with pytest.raises(BadInput, match=rf"{name}: \S+ holds NaN or infinity"):
            read()


def test_a_q_former_whose_queries_do_not_divide_into_its_times_is_refused(tmp_path):
    sizes = json.loads((WEIGHTS / "config.json").read_text())
    sizes["model"]["num_queries"] = 30
    (tmp_path / "config.json").write_text(json.dumps(sizes))
    with pytest.raises(BadInput, match="config.json: .*num_queries 30: a Q-Former asks equally often"):
        load_policy(PolicyOptions(policy=str(tmp_path)))


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool])
def test_no_reader_of_weights_takes_integers(tmp_path, dtype):
    policy, bridge = tmp_path / "w", tmp_path / "bridge"
    shutil.copytree(WEIGHTS, policy)
    for path in (policy / "model.safetensors", policy / "ranker" / "ranker.safetensors"):
        tensors = load_file(path)
        save_file(tensors | {name: x.to(dtype) for name, x in list(tensors.items())[-1:]}, path)
    config = json.loads((WEIGHTS / "config.json").read_text())
    bridge.mkdir()
    (bridge / "config.json").write_text(
        json.dumps({"model_type": "supervised_policy", "sizes": config["model"]})
    )
    save_file({"x": torch.ones(2).to(dtype)}, bridge / "bridge.safetensors")
    readers = {
        "model.safetensors": lambda: load_policy(PolicyOptions(policy=str(policy))),
        "ranker.safetensors": lambda: load_ranker(str(policy / "ranker")),
        "bridge.safetensors": lambda: take_bridge(VideoLM(TINY, CLIP), str(bridge)),
    }
    for name, read in readers.items():
        with pytest.raises(BadInput, match=rf"{name}: .*(is not stored as float|, not as floating-point)"):
            read()


def test_a_fused_projection_of_another_shape_in_an_openai_file_is_named(tmp_path):
    pieces = weight_files.Source("in_proj", third=0)
    for shape in ((), (7,), (9, 2)):
        save_file({"in_proj": torch.zeros(shape)}, tmp_path / "x.safetensors")
        tensors = weight_files.Tensors(str(tmp_path / "x.safetensors"))
        with pytest.raises(BadInput, match="x.safetensors: tensor in_proj has shape "):
            weight_files.check_tensors({"q": (3,)}, tensors, {"q": pieces}, ())


@pytest.mark.parametrize("vocab_size", [16, 18])  # of 18 a draw from NaN lies behind the last id
@pytest.mark.parametrize("greedy", [True, False])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_sampling_from_logits_that_are_not_finite_says_so(value, greedy, vocab_size):
    torch.manual_seed(0)
    policy = VideoLM(dataclasses.replace(TINY, vocab_size=vocab_size), CLIP)
    prompts = Prompts(torch.full((2, 8), 3), torch.ones(2, 8, dtype=torch.bool), torch.randn(2, 4, TINY.dim))
    uniforms = None if greedy else torch.rand(2, 3, 4)
    prompts.video_embeds[1, 0, 0] = value
    with pytest.raises(BadInput, match="logits are not finite"):
        generate(policy, prompts, 3, Sampling(4, torch.tensor([2])), uniforms)


def test_scores_of_a_ranker_that_are_not_finite_are_no_ranks(monkeypatch):
    oracle = TrainedOracle(lambda embeds, rows: torch.tensor([[1.0, math.nan]]), 0.5)
    question = Question("q", "v.mp4", "What?", "red")
    oracle.embeds = {question.shown: torch.zeros(4, 16)}
    with pytest.raises(BadInput, match="--ranker: its scores are not finite"):
        oracle.rank([question], [["a", "b"]])


# ---- files of ours


def test_a_checkpoint_with_damaged_moments_is_not_resumed():
    learner = lora.Learner(torch.nn.ModuleDict({"q_proj": torch.nn.Linear(4, 4)}), 2, 4.0)
    learner.model["q_proj"](torch.ones(1, 4)).sum().backward()
    learner.optimizer.step()
    sound = learner.tensors()
    learner.restore(sound)
    damaged = {
        "optimizer.1.exp_avg": None, "optimizer.0.step": None, "q_proj.lora_A": None,
        "optimizer.0.exp_avg_sq": torch.zeros(3), "q_proj.lora_B": sound["q_proj.lora_B"].int(),
    }  # fmt: skip
    for name, value in damaged.items():
        tensors = {k: x for k, x in (sound | {name: value}).items() if x is not None}
        with pytest.raises(ValueError, match="fit the policy"):
            learner.restore(tensors)


@pytest.mark.parametrize("line", ["[]", "1", '{"step": "1"}', '{"id": "a"}', '{"step": true}', "{", "\xff"])
def test_a_damaged_row_of_a_run_is_named_and_the_file_stays(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 0}\n' + line.encode("latin-1") + b'\n{"step": 2}\n')
    before = path.read_bytes()
    with pytest.raises(BadInput, match=r"metrics.jsonl, line 2: "):
        cut_back(str(path), {"step": int}, lambda row: row["step"] < 1)
    assert path.read_bytes() == before


@pytest.mark.parametrize("row", [{"greedy": 1}, {"sampled": "red"}, {"sampled": [1]}, {"id": 5}])
def test_kept_answers_of_another_type_are_refused(tmp_path, row):
    path = tmp_path / "answers.jsonl"
    path.write_text(json.dumps({"id": "a", "greedy": "red", "sampled": ["red"]} | row) + "\n")
    with pytest.raises(BadInput, match=r"answers.jsonl, line 1: no row with id, greedy, sampled"):
        Kept(str(path), {"greedy": str, "sampled": list[str]})


@pytest.mark.parametrize("line", ['{"id": "q"}', "[1]", '{"id": "q", "answers": "red"}', '["a"', "\xff"])
def test_damaged_samples_of_a_selection_are_refused(tmp_path, line):
    path = tmp_path / "out.samples"
    path.write_bytes(line.encode("latin-1") + b"\n")
    with pytest.raises(BadInput, match="out.samples, line 1: "):
        Kept(str(path), {"answers": list[str]})


def test_compare_names_the_run_whose_results_are_damaged(tmp_path):
    for value in ({}, {"seed": 0, "gain": 1}, {"seed": 0, "gain": {"greedy": {"ci95": ["a", 0]}}}):
        (tmp_path / "results.json").write_text(json.dumps(value))
        with pytest.raises(BadInput, match=r"results.json: not what train.py wrote"):
            compare([str(tmp_path)])


@pytest.mark.parametrize("words", [None, "red", ["red", "red"], ["red", 1], ["red", [1]], [""], ["red"] * 9])
def test_a_damaged_tokenizer_is_refused(tmp_path, words):
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps({"type": "words+bytes", "words": words}))
    with pytest.raises(BadInput, match=r"tokenizer.json: field 'words' is no list of texts"):
        WordTokenizer.load(str(path))


def test_a_tokenizer_with_more_ids_than_the_model_is_refused(tmp_path):
    WordTokenizer(["red", "blue"]).save(tmp_path / "tokenizer.json")
    assert WordTokenizer.load(tmp_path / "tokenizer.json", 262).vocab_size == 262
    with pytest.raises(BadInput, match="262 ids, the model has 261"):
        WordTokenizer.load(tmp_path / "tokenizer.json", 261)


@pytest.mark.parametrize(
    ("name", "value"),
    [("dim", "128"), ("dim", 0), ("num_layers", -1), ("num_heads", True), ("norm_eps", -1e-5), ("tied", 1)]
    + [("bridge", "foo"), ("framing", None), ("rope_scaling", []), ("num_frames", 2.5)],
)
def test_a_size_of_a_wrong_kind_in_config_json_is_named(name, value):
    check_record(ModelConfig(rope_theta=10000), "config.json", "copy it again")
    with pytest.raises(BadInput, match=rf"config.json: {name} is "):
        check_record(ModelConfig(**{name: value}), "config.json", "copy it again")


@pytest.mark.parametrize("part", ["model", "clip"])
@pytest.mark.parametrize("value", [2, "adapter", ["adapter"], None, True])
def test_a_part_of_config_json_that_is_no_object_is_named(tmp_path, part, value):
    shutil.copytree(WEIGHTS, tmp_path, dirs_exist_ok=True)
    config = json.loads((WEIGHTS / "config.json").read_text()) | {part: value}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(BadInput, match=r"config.json: 'model' and 'clip' must be objects"):
        load_policy(PolicyOptions(policy=str(tmp_path)))


def made_run(folder, **changed):
    """config.json of a run with these options changed behind their checks."""
    config = dataclasses.asdict(train.Config()) | {"made": {}} | changed
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


@pytest.mark.parametrize(
    "part, name, value",
    [
        ("model", "num_layers", 2**53), ("model", "qformer_layers", 5000), ("model", "clip_layer", -100),
        ("model", "video_start", 2), ("clip", "num_layers", 10**6), ("clip", "num_heads", 5),
        ("clip", "text_heads", 7), ("clip", "patch_size", 100),
    ],
)  # fmt: skip
def test_sizes_that_no_policy_can_have_are_refused_before_anything_is_built(tmp_path, part, name, value):
    config = json.loads((WEIGHTS / "config.json").read_text())
    config[part][name] = value
    shutil.copy(WEIGHTS / "model.safetensors", tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(BadInput, match="config.json: not what save_model wrote") as caught:
        load_policy(PolicyOptions(policy=str(tmp_path)))
    assert str(value) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "changed",
    [
        {"layer_types": 5}, {"layer_types": "full_attention"}, {"head_dim": 7}, {"num_hidden_layers": 2**50},
        {"rms_norm_eps": 10**400}, {"rope_parameters": {"rope_theta": 10**400}},
    ],
)  # fmt: skip
def test_sizes_that_no_pretrained_decoder_can_have_are_refused_before_anything_is_built(changed):
    config = hf_config(TINY)
    decoder_config(config, "w/config.json")
    with pytest.raises(BadInput, match="^w/config.json: "):
        decoder_config(config | changed, "w/config.json")


@pytest.mark.parametrize(
    "of_vision, layer", [({"num_attention_heads": 3}, -2), ({"patch_size": 99}, -2), ({}, -100), ({}, 3)]
)
def test_an_image_tower_that_cannot_be_or_a_layer_that_it_lacks_is_refused(of_vision, layer):
    vision = dict(hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    vision |= dict(image_size=28, patch_size=14)
    for changed, wanted in ((vision, -2), (vision | of_vision, layer)):
        config = dict(text_config=hf_config(TINY), vision_config=changed, vision_feature_layer=wanted)
        if (changed, wanted) == (vision, -2):
            llava_configs(config, "w/config.json", 2, "auto")
        else:
            with pytest.raises(BadInput, match="^w/config.json: "):
                llava_configs(config, "w/config.json", 2, "auto")


@pytest.mark.parametrize("changed", [{"seed": -1}, {"num_frames": "8"}, {"dtype": 5}, {"think": 1}])
def test_an_option_that_is_damaged_in_a_runs_config_json_is_told_with_the_file(tmp_path, changed):
    folder = made_run(tmp_path, **{"dtype": "float32"} | changed)
    name = f"^--{next(iter(changed))} .*config.json$"
    with pytest.raises(BadInput, match=name):
        stored_options({"out": folder, "resume": True}, train.Config)
    with pytest.raises(BadInput, match=name):
        load_run(folder)


def test_a_message_with_a_value_without_end_keeps_its_name_and_its_remedy(capsys):
    with pytest.raises(SystemExit):
        run_script(lambda: checked("seed", Seed, "x" * 10**6))
    told = capsys.readouterr().err
    assert len(told) < 1100 and told.startswith("error: --seed xxx") and "give a whole number" in told


PROGRESS_OF_A_RUN = {
    "step": 1, "bad_steps": 0, "bad_in_a_row": 0, "wall_s": 0.5, "before": {}, "before_values": {}
}  # fmt: skip


@pytest.mark.parametrize(
    "damage", [{name: "1"} for name in PROGRESS_OF_A_RUN] + [{"bad_in_a_row": None}, {"step": 1.5}, None]
)
def test_a_checkpoint_whose_progress_is_damaged_is_not_resumed(tmp_path, damage):
    run = SimpleNamespace(out=str(tmp_path), writes=False, learner=SimpleNamespace(restore=lambda x: None))
    for progress in (PROGRESS_OF_A_RUN, PROGRESS_OF_A_RUN | damage if damage else [PROGRESS_OF_A_RUN]):
        metadata = {"progress": json.dumps(progress)}
        save_file({"x": torch.ones(1)}, tmp_path / "checkpoint.safetensors", metadata)
        if progress == PROGRESS_OF_A_RUN:
            RunFolder.load(run)
            assert run.step == 1
        else:
            with pytest.raises(BadInput, match=r"checkpoint.safetensors: its progress has no step, .*anew"):
                RunFolder.load(run)


def test_progress_that_was_changed_behind_its_digest_is_not_resumed(tmp_path):
    run = SimpleNamespace(
        out=str(tmp_path), writes=True, progress=PROGRESS_OF_A_RUN, step=3, wall_s=lambda: 1.0,
        learner=SimpleNamespace(tensors=lambda: {"x": torch.ones(1)}, restore=lambda tensors: None),
        write_adapter=lambda: None,
    )  # fmt: skip
    RunFolder.save(run)
    RunFolder.load(run)
    assert run.step == 3
    path = tmp_path / "checkpoint.safetensors"
    path.write_bytes(path.read_bytes().replace(b"before", b"bifore"))
    with pytest.raises(BadInput, match=r"checkpoint.safetensors: its progress is damaged; .*anew"):
        RunFolder.load(run)


@pytest.mark.parametrize("damage", [{"seconds": 1}, {"seconds": []}, {"commands": "a"}, {"commands": None}])
def test_a_damaged_record_of_how_weights_were_made_is_refused(tmp_path, monkeypatch, damage):
    shutil.copytree(WEIGHTS, tmp_path, dirs_exist_ok=True)
    made = json.loads((WEIGHTS / "made.json").read_text()) | damage
    (tmp_path / "made.json").write_text(json.dumps(made))
    monkeypatch.setattr(embedded.world, "make_world", lambda *given, **options: None)
    monkeypatch.setattr(embedded, "load_clips", lambda *given: (None, None))
    monkeypatch.setattr(embedded, "run_stage", lambda *given: pytest.fail("it must not be trained"))
    with pytest.raises(BadInput, match=r"made.json: 'seconds' or 'commands' is damaged; remove it"):
        embedded.train_world(pretrain.Config(out=str(tmp_path), stage="align", num_clips=1))


@pytest.mark.parametrize("options", [None, 1, [], "seed"])
def test_a_supervised_training_with_damaged_options_is_not_resumed(tmp_path, options):
    (tmp_path / "config.json").write_text(json.dumps({"options": options}))
    cfg = pretrain.Config(out=str(tmp_path), policy=str(WEIGHTS), stage="sft", resume=True)
    with pytest.raises(BadInput, match=r"config.json: options is missing or damaged"):
        check_out(cfg)


@pytest.mark.parametrize("damage", ["history", "parameter.0", "optimizer.0.step", "optimizer.0.exp_avg"])
@pytest.mark.parametrize("missing", [True, False])
def test_a_supervised_training_with_a_damaged_state_is_not_resumed(tmp_path, damage, missing):
    p = torch.nn.Parameter(torch.ones(4))
    stored = {"parameter.0": torch.ones(4), "optimizer.0.step": torch.tensor(1.0)}
    stored |= {f"optimizer.0.{name}": torch.ones(4) for name in ("exp_avg", "exp_avg_sq")}
    path, metadata = tmp_path / "training.safetensors", {"history": '[{"step": 1}]'}
    save_file(stored, path, metadata)
    assert load_training(str(tmp_path), [p], torch.optim.AdamW([p])) == [{"step": 1}]
    if damage == "history":
        metadata = {} if missing else {"history": "[1]"}
    stored = {k: torch.ones(3) if k == damage else x for k, x in stored.items() if k != damage or not missing}
    save_file(stored, path, metadata)
    with pytest.raises(BadInput, match="training.safetensors: "):
        load_training(str(tmp_path), [p], torch.optim.AdamW([p]))


def test_a_critic_that_does_not_fit_is_not_resumed():
    learner = lora.Learner(
        torch.nn.ModuleDict({"q_proj": torch.nn.Linear(4, 4)}), 2, 4.0, 0, torch.nn.Linear(4, 1)
    )
    sound = learner.tensors()
    learner.restore(sound)
    for value in (None, torch.ones(1), sound["critic.weight"].int()):
        tensors = {k: x for k, x in (sound | {"critic.weight": value}).items() if x is not None}
        with pytest.raises(ValueError, match="critic.weight does not fit the policy"):
            learner.restore(tensors)


@pytest.mark.parametrize("damage", [{"sizes": None}, {"clip": 1}, {"fingerprints": []}, {"sizes": {"a": 1}}])
def test_a_damaged_folder_of_supervised_training_is_refused(tmp_path, damage):
    config = dict(decoder=str(WEIGHTS), clip="", template="auto", video_tokens="auto", sizes={})
    config["fingerprints"] = {name: train.fingerprint(config[name]) for name in ("decoder", "clip")}
    config |= {"sizes": {"num_frames": 8}, "model_type": "supervised_policy"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    decoder_options(PolicyOptions(policy=str(tmp_path)))
    (tmp_path / "config.json").write_text(json.dumps(config | damage))
    save_file({"x": torch.ones(1)}, tmp_path / "bridge.safetensors")
    with pytest.raises(BadInput, match=r"config.json|num_frames"):
        load_supervised(PolicyOptions(policy=str(tmp_path)), "cpu")


# ---- files of others


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ('"' + "x" * 200_000 + '",1,2,3', "field larger than"),
        ('1,2,"3,4', "unexpected end of data"),
        ("1,2,3,4,5", "has more fields than line 1"),
        ("1,2,\xff,4", "not a UTF-8 text"),
    ],
)
def test_a_damaged_table_is_refused_and_loses_no_row(tmp_path, rows, words):
    path = tmp_path / "MSVD_QA.csv"
    path.write_bytes(b"question,answer,question_id,video_name\n" + rows.encode("latin-1") + b"\n")
    with pytest.raises(BadInput, match=words):
        convert("msvd_qa", [str(path)], str(tmp_path), str(tmp_path / "out.jsonl"))
    assert os.listdir(tmp_path) == ["MSVD_QA.csv"]


@pytest.mark.parametrize("times", [[1, 2], [[1]], [True, True], ["ab"], [{"0": 1}], [[1, "2"]]])
def test_a_moment_that_is_no_pair_of_numbers_is_named(tmp_path, times):
    path = tmp_path / "train.json"
    path.write_text(json.dumps({"v": {"duration": 9, "timestamps": times, "sentences": ["a"] * len(times)}}))
    with pytest.raises(BadInput, match=r"video v: column 'timestamps' is .* not a list of \[start, end\]"):
        convert("activitynet_captions", [str(path)], str(tmp_path), str(tmp_path / "out.jsonl"))


def test_a_line_of_a_mapping_that_is_no_pair_is_named(tmp_path):
    (tmp_path / "youtube_mapping.txt").write_text("a vid1\nb\n")
    (tmp_path / "train_qa.json").write_text("[]")
    with pytest.raises(BadInput, match="youtube_mapping.txt: 'b' is no line <clip> <video>"):
        convert("msvd_qa", [str(tmp_path)], str(tmp_path), str(tmp_path / "out.jsonl"))


# ---- options, functions, what is printed


@pytest.mark.parametrize("video", ["../a.mp4", "a/../../b.mp4", "/dev/zero", ".."])
def test_a_video_outside_the_folder_of_videos_is_refused(tmp_path, video):
    row = {"id": "1", "video": video, "question": "q", "answer": "a"}
    row |= {"chosen": "a", "rejected": "b"}
    (tmp_path / "q.jsonl").write_text(json.dumps(row))
    for load in (questions.load_questions, load_pairs):
        with pytest.raises(BadInput, match=r"line 1: .*video.*--videos"):
            load(str(tmp_path / "q.jsonl"), str(tmp_path))


def test_every_numeric_option_states_its_range():
    for config in (train.Config, pretrain.Config, selection.Config, ask.AskOptions, tour.TourOptions):
        for field in dataclasses.fields(config):
            kind, *bounds = get_args(field.type) or (field.type,)
            assert kind not in (int, float) or isinstance(bounds[0], Bounds), f"{config}: {field.name}"


@pytest.mark.parametrize(
    "spec", ["builtins:max", "os:getcwd", "math:pi", "no_such:f", "json", ":", "json:dumps"]
)
def test_a_function_that_cannot_rank_is_refused_before_the_run(spec):
    with pytest.raises(BadInput, match=rf"--oracle {spec}: "):
        load_function(spec)


def test_a_module_that_ends_the_program_is_refused(tmp_path, monkeypatch):
    (tmp_path / "ends_at_once.py").write_text("import sys; sys.exit(0)")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(BadInput, match="SystemExit"):
        load_function("ends_at_once:f")


def test_a_name_that_is_no_utf_8_is_one_line(capsys):
    with pytest.raises(SystemExit) as ended:
        run_script(lambda: "caf\udce9.mp4".encode())
    told = capsys.readouterr().err
    assert ended.value.code == 2 and told.startswith("error: caf\ufffd.mp4: not a text in UTF-8")


def test_tables_and_reports_print_no_control_characters(tmp_path, capsys):
    part = {"accuracy": 0.5, "n": 1, "ci95": [0.4, 0.6], "mean_iou": None}
    part["by_category"] = {"\x1b[2J|a\nb": {"accuracy": 0.5, "n": 1}}
    both = {"greedy": part, "sampled": part}
    assert evaluation.table(both, both).splitlines()[2].startswith("| \ufffd[2J/a b |")
    row = {"id": "1", "video": "\x1b]0;t\x07\nerror: x.mp4", "question": "q", "answer": "a"}
    (tmp_path / "q.jsonl").write_text(json.dumps(row))
    assert not questions.check(str(tmp_path / "q.jsonl"), str(tmp_path))
    told = capsys.readouterr().out
    assert told.count("\n") == 2 and not any(c in told for c in "\x1b\x07")
