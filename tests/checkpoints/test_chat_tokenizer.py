"""The tokenizer's own chat template against transformers' apply_chat_template; ends; what does not fit."""

import json

import pytest

from checkpoints.chat_tokenizer import TEMPLATES, ChatTokenizer
from plumbing.options import BadInput

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")
pytest.importorskip("jinja2")

V = 400
QUESTION = "what does the red block do?\n(A) it moves (B) ümlaut"
SPECIAL = [
    "<unk>", "<s>", "</s>", "<image>", "<|im_start|>", "<|im_end|>", "<|begin_of_text|>", "<|eot_id|>",
    "<|start_header_id|>", "<|end_header_id|>", "<|user|>", "<|assistant|>", "<|endoftext|>", "<｜User｜>",
    "<｜Assistant｜>",
]  # fmt: skip
# Written here in the manner of six families: (template, bos_token, eos_token, what closes a turn)
FAMILIES = {
    "chatml": (
        "{% for message in messages %}{% if loop.first and message.role != 'system' %}<|im_start|>system\n"
        "Be brief.<|im_end|>\n{% endif %}{{ '<|im_start|>' + message.role + '\n' + message['content'] +"
        " '<|im_end|>' + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
        "{% endif %}",
        None, "<|endoftext|>", "<|im_end|>",
    ),
    "llama-2": (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('roles must alternate') }}{% endif %}{% if message['role'] == 'user' %}"
        "{{ bos_token + '[INST] ' + message['content'].strip() + ' [/INST]' }}{% else %}"
        "{{ ' ' + message['content'] + ' ' + eos_token }}{% endif %}{% endfor %}",
        "<s>", "</s>", "</s>",
    ),
    "llama-3": (
        "{{- bos_token }}\n{%- if strftime_now is defined and false %}\n    {{- strftime_now('%Y') }}\n"
        "{%- endif %}\n{%- for message in messages %}\n    {{- '<|start_header_id|>' + message['role'] +"
        " '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }}\n{%- endfor %}\n"
        "{%- if add_generation_prompt %}\n    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}\n"
        "{%- endif %}",
        "<|begin_of_text|>", "<|eot_id|>", "<|eot_id|>",
    ),
    "qwen3": (
        "{%- set ns = namespace(last=messages|length - 1) %}{%- for message in messages %}{%- set content ="
        " message.content %}{%- if content is string and '</think>' in content %}{%- set content ="
        " content.split('</think>')[-1] %}{%- endif %}{{- '<|im_start|>' + message.role + '\n' + content +"
        " '<|im_end|>\n' }}{%- if loop.index0 == ns.last %}{%- break %}{%- endif %}{%- endfor %}"
        "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- if enable_thinking is defined and"
        " enable_thinking is false %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}{%- endif %}",
        None, "<|im_end|>", "<|im_end|>",
    ),
    "zephyr": (
        "{% for message in messages %}\n{% if message['role'] == 'user' %}\n{{ '<|user|>\n' +"
        " message['content'] + eos_token }}\n{% elif message['role'] == 'assistant' %}\n{% generation %}"
        "{{ '<|assistant|>\n'  + message['content'] + eos_token }}{% endgeneration %}\n{% endif %}\n"
        "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}",
        "<s>", "</s>", "</s>",
    ),
    "deepseek": (
        "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}{{ '<｜User｜>' +"
        " message['content'] }}{% else %}{{ '<｜Assistant｜>' + message['content'] + eos_token }}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<｜Assistant｜>' }}{% endif %}",
        "<s>", "</s>", "</s>",
    ),
}  # fmt: skip


def tokenizer_folder(folder, template="", bos=None, eos="</s>", special=SPECIAL, front="<s>", behind=""):
    """A byte-level BPE that transformers saves, with what its post-processor puts around a text."""
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>"))
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=V - 1, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(["what does the red block do? (A) it moves (B) it stays"] * 3, trainer)
    around = [(text, bpe.token_to_id(text)) for text in (front, behind) if text]
    bpe.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{front} $A {behind}".strip(), special_tokens=around
    )
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=bos, eos_token=eos)
    fast.chat_template = template or None
    fast.save_pretrained(folder)
    return transformers.AutoTokenizer.from_pretrained(folder)


def asked(text):
    return [{"role": "user", "content": text}]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_prompt_is_what_apply_chat_template_gives_around_the_video(family, tmp_path):
    template, bos, eos, closing = FAMILIES[family]
    auto = tokenizer_folder(tmp_path, template, bos, eos)
    options = dict(add_generation_prompt=True, enable_thinking=False)
    ours = ChatTokenizer(str(tmp_path), "auto", None, V)
    text = auto.apply_chat_template(asked(f"<image>\n{QUESTION}"), tokenize=False, **options)
    before, after = (auto(part, add_special_tokens=False).input_ids for part in text.split("<image>"))
    assert ours.prompt(QUESTION, 3) == before + 3 * [V] + after
    assert ours.video_start == len(before)
    end = auto.convert_tokens_to_ids(closing)
    assert ours.end_ids[0] == end and not ours.banned_ids(V)[list(ours.end_ids)].any()
    assert auto.convert_tokens_to_ids(eos) in ours.end_ids
    assert ours.decode([*ours.encode("it moves"), end]) == "it moves"
    if not bos:
        return
    whole = ChatTokenizer(str(tmp_path), "auto", auto.convert_tokens_to_ids("<image>"), V)
    ids = auto.apply_chat_template(asked(f"<image>\n{QUESTION}"), return_dict=False, **options)
    if family == "zephyr":  # no BOS in the template: a processor's tokenizer puts it in front
        ids = [auto.bos_token_id, *ids]
    assert whole.prompt(QUESTION, 1) == ids


def test_thinking_is_the_templates_own_switch(tmp_path):
    tokenizer_folder(tmp_path, *FAMILIES["qwen3"][:3])
    thinks, answers = (ChatTokenizer(str(tmp_path), "auto", None, V, think) for think in (True, False))
    nothing = answers.encode("<think>\n\n</think>\n\n")
    assert thinks.prompt("a", 1) + nothing == answers.prompt("a", 1)
    named = ChatTokenizer(str(tmp_path), "qwen3", None, V)
    assert named.prompt("a", 1)[len(named.opening) :] == answers.prompt("a", 1)


@pytest.mark.parametrize(
    "where", ["tokenizer_config.json", "list", "chat_template.json", "chat_template.jinja"]
)
def test_the_template_is_found_where_writers_leave_it(where, tmp_path):
    template = FAMILIES["chatml"][0]
    tokenizer_folder(tmp_path)
    for left in ("chat_template.jinja", "chat_template.json"):
        (tmp_path / left).unlink(missing_ok=True)
    if where == "chat_template.jinja":
        (tmp_path / where).write_text(template)
    elif where == "chat_template.json":
        (tmp_path / where).write_text(json.dumps({"chat_template": template}))
    else:
        path = tmp_path / "tokenizer_config.json"
        several = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": template}]
        found = several if where == "list" else template
        path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": found}))
    ours = ChatTokenizer(str(tmp_path), "auto", None, V)
    assert ours.tokenizer.decode(ours.prompt("a", 0), skip_special_tokens=False).startswith("<|im_start|>")
    assert ours.prompt("a", 0)[-3:] == ours.encode("<|im_start|>assistant\n")[-3:]


def test_a_processors_template_takes_a_picture_and_text_parts(tmp_path):
    template = (
        "{% for message in messages %}{{ message['role'].upper() + ': ' }}{% for part in message['content'] |"
        " selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}{% for part in"
        " message['content'] | selectattr('type', 'equalto', 'text') %}{{ part['text'] + ' ' }}{% endfor %}"
        "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
    )
    auto = tokenizer_folder(tmp_path, bos="<s>")
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    image = auto.convert_tokens_to_ids("<image>")
    ours = ChatTokenizer(str(tmp_path), "auto", image, V)
    assert ours.prompt("what moves?", 1) == auto("USER: <image>\nwhat moves? ASSISTANT:").input_ids
    assert ours.end_ids == (auto.eos_token_id,)  # nothing closes its turns, so the model's own end does


def test_a_prompt_ends_where_the_answer_begins_whatever_the_tokenizer_adds(tmp_path):
    tokenizer_folder(tmp_path, front="<s>", behind="</s>")
    ours = ChatTokenizer(str(tmp_path), "vicuna_v1", None, V)
    ids = ours.prompt("what moves?", 2)
    assert ids[0] == 1 and 2 not in ids and ours.decode(ids[-3:]).endswith(":")


def test_ends_are_the_models_own_and_never_banned(tmp_path):
    auto = tokenizer_folder(tmp_path, eos="</s>")
    user, eot = (auto.convert_tokens_to_ids(text) for text in ("<｜User｜>", "<|eot_id|>"))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [user]}))
    (tmp_path / "config.json").write_text(json.dumps({"text_config": {"eos_token_id": 2}}))
    ours = ChatTokenizer(str(tmp_path), "vicuna_v1", None, V)
    assert ours.end_ids == (user, 2) and ours.banned_ids(V)[eot]
    assert ChatTokenizer(str(tmp_path), "llama-3", None, V).end_ids == (eot, user, 2)


def test_a_template_whose_special_tokens_the_vocabulary_lacks_is_refused_with_those_that_fit(tmp_path):
    few = SPECIAL[:6]
    tokenizer_folder(tmp_path / "named", special=few)
    with pytest.raises(
        BadInput, match="has no token <.start_header_id.>, which --template llama-3 needs;.*chatml"
    ):
        ChatTokenizer(str(tmp_path / "named"), "llama-3", None, V)
    tokenizer_folder(tmp_path / "own", FAMILIES["llama-3"][0], "<s>", special=few)
    with pytest.raises(BadInput, match="which its own chat template needs; those that fit: vicuna_v1"):
        ChatTokenizer(str(tmp_path / "own"), "auto", None, V)
    for template in TEMPLATES:  # all of them fit the vocabulary that has all their tokens
        tokenizer_folder(tmp_path / "all")
        ChatTokenizer(str(tmp_path / "all"), template, None, V)
    with pytest.raises(BadInput, match="^--template vicuna: choose one of auto, vicuna_v1"):
        ChatTokenizer(str(tmp_path / "all"), "vicuna", None, V)


BROKEN = [
    "{% for %}", "{{ raise_exception('never') }}", "fixed text", "{{ 10**5000 }}",
    "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "{% if 1 %}" * 2000 + "{% endif %}" * 2000,
]  # fmt: skip


def test_a_template_that_keeps_the_video_and_drops_the_question_is_refused(tmp_path):
    tokenizer_folder(tmp_path, r"{{ messages[0].content.split('\n')[0] }}")
    with pytest.raises(BadInput, match="chat template leaves the user's text out"):
        ChatTokenizer(str(tmp_path), "auto", None, V).prompt(QUESTION, 1)


@pytest.mark.parametrize("template", BROKEN, ids=range(len(BROKEN)))
def test_a_broken_template_is_one_line_that_names_the_way_out(template, tmp_path):
    tokenizer_folder(tmp_path, template)
    with pytest.raises(BadInput, match="chat template.*name a --template$"):
        ChatTokenizer(str(tmp_path), "auto", None, V)


@pytest.mark.parametrize(
    "found", [5, {"default": 5}, {"tools": "x"}, [{"name": ["x"], "template": "y"}], ["default"], []]
)
def test_a_chat_template_that_is_no_text_is_never_passed_over(found, tmp_path):
    tokenizer_folder(tmp_path)
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": found}))
    with pytest.raises(BadInput, match="chat_template.json: .*name a --template$"):
        ChatTokenizer(str(tmp_path), "auto", None, V)
    ChatTokenizer(str(tmp_path), "vicuna_v1", None, V)


@pytest.mark.parametrize("found", [[[2]], {"a": 1}, "2", 2.0, True, [2, None]])
@pytest.mark.parametrize("file", ["generation_config.json", "config.json"])
def test_an_end_that_is_no_id_is_refused_with_its_file(file, found, tmp_path):
    tokenizer_folder(tmp_path)
    (tmp_path / file).write_text(json.dumps({"eos_token_id": found}))
    with pytest.raises(BadInput, match=f"/{file}: eos_token_id is "):
        ChatTokenizer(str(tmp_path), "vicuna_v1", None, V)


@pytest.mark.parametrize("kind", ["WordLevel", "BPE"])
@pytest.mark.parametrize("vocab", [{}, {"zzz": 0}])
def test_a_vocabulary_that_cannot_spell_a_prompt_is_refused(kind, vocab, tmp_path):
    model = {"type": kind, "vocab": vocab} | ({"merges": []} if kind == "BPE" else {"unk_token": "<unk>"})
    (tmp_path / "tokenizer.json").write_text(json.dumps({"version": "1.0", "model": model}))
    with pytest.raises(BadInput, match="tokenizer.json: .*cannot spell .*copy the checkpoint's own file"):
        ChatTokenizer(str(tmp_path), "plain", None, V)
