"""A pretrained decoder's own tokenizer, and the conversation that its prompts are.

The conversation is the tokenizer's own chat template, rendered by jinja2, or a named one of TEMPLATES.
"""

import json
import os
import re
from datetime import datetime

import torch

from plumbing.options import BadInput, is_kind, read_json, read_text

# What stands before the video, what stands after the question, and the token that closes an answer ("": the
# model's own end). The systems' texts are those that LLaVA-1.5, LLaMA-2-chat and ChatML were tuned with.
TEMPLATES = {
    "vicuna_v1": (
        "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful,"
        " detailed, and polite answers to the user's questions. USER: ",
        " ASSISTANT:",
        "",
    ),
    "llama-2": (
        "[INST] <<SYS>>\nYou are a helpful language and vision assistant. You are able to understand the"
        " visual content that the user provides, and assist the user with a variety of tasks using natural"
        " language."
        "\n<</SYS>>\n\n",
        " [/INST]",
        "",
    ),
    "llama-3": (
        "<|start_header_id|>user<|end_header_id|>\n\n",
        "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        "<|eot_id|>",
    ),
    "mistral": ("[INST] ", " [/INST]", ""),
    "chatml": (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n",
        "<|im_end|>\n<|im_start|>assistant\n",
        "<|im_end|>",
    ),
    "qwen3": ("<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n", "<|im_end|>"),
    "plain": ("", "\n", ""),
}
NO_THOUGHTS = "<think>\n\n</think>\n\n"  # Qwen3 answers at once behind an empty think part
SPECIAL_FORM = re.compile(r"<[|｜][^<>]+[|｜]>")  # as special tokens are spelt: <|im_end|>
END_TOKENS = ("</s>", "<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|end_of_text|>")
COPY_AGAIN = "copy the checkpoint's own file again"
A_DAY = datetime(2024, 7, 26)  # "today" in templates that ask for it, so that prompts never change


class ChatTokenizer:
    """A pretrained decoder's tokenizer.json, by the `tokenizers` package, with a conversation.

    template: a name of TEMPLATES, or "auto": the tokenizer's own chat template, vicuna_v1 where it has none.
    placeholder_id: config.json's image_token_index, which stands for one video token. Where tokenizer.json
    knows that id, its text is part of what is tokenised, so the result is AutoTokenizer's. Where it does not,
    the texts before and after the video are tokenised one by one, as LLaVA's own code does. None, for a text
    decoder, becomes V, which is behind the last row of the embedding: no text and no draw can ever give it.
    think: whether the answer has a think part.

    end_ids holds all ids that end an answer. The first one closes a turn of the conversation; that is the one
    to learn. Raises BadInput for files and templates that do not belong together.
    """

    instructed = True  # every prompt tells the answer format

    def __init__(self, folder: str, template: str, placeholder_id: int | None, V: int, think: bool = False):
        self.path, self.think = os.path.join(folder, "tokenizer.json"), think
        self.tokenizer = read_tokenizer(self.path)
        self.vocab_size = 1 + max(self.tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
        highest = max(self.vocab_size - 1, placeholder_id or 0)
        if highest >= V:
            raise BadInput(f"{self.path}: id {highest} exceeds the model's {V} rows; use files of one model")
        self.processor = placeholder_id is not None  # whose template takes pictures
        self.placeholder_id = V if placeholder_id is None else placeholder_id
        self.video = self.tokenizer.id_to_token(self.placeholder_id) or "<image>"
        special = {i: t.content for i, t in self.tokenizer.get_added_tokens_decoder().items() if t.special}
        self.special_texts = set(special.values()) | {self.video}
        self.names, own = special_names(folder), own_template(folder) if template == "auto" else ""
        template = "vicuna_v1" if template == "auto" else template
        if not own and template not in TEMPLATES:
            raise BadInput(f"--template {template}: choose one of auto, {', '.join(TEMPLATES)}")
        self.own, self.named = compiled(own, folder) if own else None, TEMPLATES[template]
        after = self.named[1] + NO_THOUGHTS * (template == "qwen3" and not think)
        self.named = (self.named[0], after, self.named[2])
        self.opening = self.added_in_front()
        self.check_vocabulary("its own chat template" if own else f"--template {template}")
        self.end_ids = self.find_ends(folder, special)
        self.banned = (set(special) | {self.placeholder_id}) - set(self.end_ids)
        self.video_start = self.prompt("", 1).index(self.placeholder_id)

    def added_in_front(self) -> list[int]:
        """What the tokenizer puts in front of a text by itself. What it puts behind would come between the
        prompt and its answer, and is left out."""
        alone, whole = self.encode("a"), self.encode("a", whole=True)
        places = [i for i in range(len(whole)) if alone and whole[i : i + len(alone)] == alone]
        if not places:
            raise BadInput(f"{self.path}: its vocabulary cannot spell the letter a; {COPY_AGAIN}")
        return whole[: places[0]]

    def check_vocabulary(self, what: str) -> None:
        """BadInput if the conversation has a special token that the vocabulary lacks."""
        known = self.tokenizer.token_to_id
        texts = self.render("") + self.named[2] * (self.own is None)
        wanted = [token for token in SPECIAL_FORM.findall(texts) if token != self.video]
        lack = next((token for token in wanted if known(token) is None), "")
        if lack:
            needs = {name: SPECIAL_FORM.findall("".join(parts)) for name, parts in TEMPLATES.items()}
            fit = ", ".join(name for name, tokens in needs.items() if None not in map(known, tokens))
            raise BadInput(f"{self.path}: has no token {lack}, which {what} needs; those that fit: {fit}")

    def find_ends(self, folder: str, special: dict[int, str]) -> tuple[int, ...]:
        """The end of a turn, then eos_token_id of generation_config.json and config.json, eos_token."""
        ends, known = [], self.tokenizer.token_to_id
        if self.own is None and self.named[2]:
            ends.append(known(self.named[2]))
        elif self.own is not None:
            ends += [i for i in self.encode(self.behind_answer()) if i in special][:1]
        for name in ("generation_config.json", "config.json"):
            path = os.path.join(folder, name)
            config = read_json(path, COPY_AGAIN, optional=True)
            for part in (config, config.get("text_config")):
                ends += stored_ends(part, path) if isinstance(part, dict) else []
        ends.append(known(self.names.get("eos_token", "")))
        ends = [i for i in dict.fromkeys(ends) if i is not None and 0 <= i < self.vocab_size]
        ends = ends or [i for i in map(known, END_TOKENS) if i is not None]
        if not ends:
            remedy = "give eos_token_id in a generation_config.json beside it"
            raise BadInput(f"{self.path}: no end token is known; {remedy}")
        return tuple(ends)

    def render(self, text: str) -> str:
        """The conversation up to where the answer begins, the video's text in it once."""
        before, after, _ = self.named
        if self.own is None:
            return f"{before}{self.video}\n{text}{after}"
        parts = [{"type": "image"}, {"type": "text", "text": text}]
        for content in [parts] * self.processor + [f"{self.video}\n{text}"]:
            rendered = self.fill_in([{"role": "user", "content": content}], add_generation_prompt=True)
            if rendered.count(self.video) == 1 and text.strip() in rendered:
                return rendered
        raise BadInput(f"{self.path}: its chat template leaves the user's text out; name a --template")

    def behind_answer(self) -> str:
        """What the tokenizer's own template puts behind an answer; empty where it takes none."""
        answer = "ANSWER"
        for content in [[{"type": "text", "text": answer}]] * self.processor + [answer]:
            user = [{"type": "text", "text": "a"}] if isinstance(content, list) else "a"
            turns = [{"role": "user", "content": user}, {"role": "assistant", "content": content}]
            _, found, behind = self.fill_in(turns).rpartition(answer)
            if found and "'type'" not in behind:
                return behind
        return ""

    def fill_in(self, messages: list[dict], **options) -> str:
        import jinja2

        try:
            return self.own.render(messages=messages, enable_thinking=self.think, **self.names, **options)
        except (TypeError, jinja2.UndefinedError):  # a template of texts was given parts
            return ""
        except Exception as error:  # a template is foreign code, which may raise anything
            words = f"its chat template cannot be rendered ({error}); name a --template"
            raise BadInput(f"{self.path}: {words}") from error

    def encode(self, text: str, whole: bool = False) -> list[int]:
        """whole: with what the tokenizer puts around a text by itself."""
        try:
            return self.tokenizer.encode(text, add_special_tokens=whole).ids
        except Exception as error:  # the package raises no class of its own
            raise BadInput(f"{self.path}: cannot spell {text[:40]!r} ({error}); {COPY_AGAIN}") from error

    def decode(self, ids: list[int]) -> str:
        words = [i for i in ids if i not in self.end_ids]
        return self.tokenizer.decode(words, skip_special_tokens=True).strip()

    def banned_ids(self, V: int) -> torch.Tensor:
        """(V,) bool: ids that are never produced: special ids but the ends, the placeholder, unused rows."""
        ids = torch.arange(V)
        return torch.isin(ids, torch.tensor(sorted(self.banned))) | (ids >= self.vocab_size)

    def prompt(self, text: str, num_video_tokens: int) -> list[int]:
        """Ids of the conversation, the placeholder repeated. BadInput: text holds a special token."""
        special = next((token for token in sorted(self.special_texts) if token in text), None)
        if special is not None:
            shown = json.dumps(text[:60])
            raise BadInput(f"question {shown}: holds the special token {special}; take it out")
        rendered = self.render(text)
        before, after = rendered.split(self.video)
        # A text decoder's own template spells its BOS itself, or means that there is none
        bos = self.names.get("bos_token")
        begun = self.own is not None and (not self.processor or bool(bos) and rendered.startswith(bos))
        opening, video = [] if begun else self.opening, [self.placeholder_id] * num_video_tokens
        if self.tokenizer.id_to_token(self.placeholder_id) is None:
            return opening + self.encode(before) + video + self.encode(after)
        ids = opening + self.encode(rendered)
        place = ids.index(self.placeholder_id)
        return ids[:place] + video + ids[place + 1 :]


def read_tokenizer(path: str):
    try:
        import tokenizers
    except ImportError as error:
        raise BadInput(f"{path}: needs the package tokenizers: pip install tokenizers") from error
    if not os.path.isfile(path):
        raise BadInput(f"{path}: no such file; copy the checkpoint's tokenizer.json there")
    try:
        tokenizer = tokenizers.Tokenizer.from_file(path)
    except Exception as error:  # the package raises no class of its own
        raise BadInput(f"{path}: {str(error).splitlines()[0]}; copy the file again") from error
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def stored_ends(config: dict, path: str) -> list[int]:
    """eos_token_id of a config: one id, a list of ids, or none."""
    found = config.get("eos_token_id")
    ids = found if isinstance(found, list) else [found]
    if found is not None and not is_kind(ids, list[int]):
        words = f"eos_token_id is {found!r}; give one id or a list of ids, whole numbers"
        raise BadInput(f"{path}: {words}")
    return [] if found is None else ids


def special_names(folder: str) -> dict[str, str]:
    """bos_token, eos_token and the like, as chat templates ask for them."""
    names = {}
    for file in ("special_tokens_map.json", "tokenizer_config.json"):
        found = read_json(os.path.join(folder, file), COPY_AGAIN, optional=True)
        for name, value in found.items():
            text = value.get("content") if isinstance(value, dict) else value
            if name.endswith("_token") and isinstance(text, str):
                names[name] = text
    return names


def own_template(folder: str) -> str:
    """The chat template that came with a tokenizer, where transformers looks for it; "" if none did."""
    path = os.path.join(folder, "chat_template.jinja")
    if os.path.exists(path):
        return read_text(path, COPY_AGAIN)
    for name in ("chat_template.json", "tokenizer_config.json"):  # a processor's file, the tokenizer's
        path = os.path.join(folder, name)
        found = read_json(path, COPY_AGAIN, optional=True).get("chat_template")
        if found is None:
            continue
        if isinstance(found, dict):
            found = found.get("default")
        elif is_kind(found, list[dict]):  # several, each with a name
            found = next((one.get("template") for one in found if one.get("name") == "default"), None)
        if not isinstance(found, str):
            raise BadInput(f"{path}: chat_template is no text, nor is one named default; name a --template")
        return found
    return ""


def compiled(template: str, folder: str):
    """A jinja2 template as transformers renders it. Templates are foreign code, so they run in jinja2's
    sandbox. `{% generation %}` marks answers for others' training and means nothing here."""
    try:
        import jinja2
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError as error:
        words = "its chat template needs the package jinja2: pip install jinja2, or name a --template"
        raise BadInput(f"{folder}: {words}") from error

    def raise_exception(message):
        raise jinja2.TemplateError(message)

    def to_json(value, ensure_ascii=False, **options):
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    loops = ["jinja2.ext.loopcontrols"]
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=loops)
    environment.filters["tojson"] = to_json
    environment.globals |= {"raise_exception": raise_exception, "strftime_now": A_DAY.strftime}
    for tag, known in (("generation", "if true"), ("endgeneration", "endif")):
        template = re.sub(rf"(\{{%[-+]?\s*){tag}(\s*[-+]?%\}})", rf"\1{known}\2", template)
    try:
        return environment.from_string(template)
    except Exception as error:  # a template is foreign code, nested or computing without end
        raise BadInput(f"{folder}: its chat template is broken ({error}); name a --template") from error
