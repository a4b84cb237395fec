"""A pretrained decoder's own tokenizer, and the conversation that its prompts are."""

import json
import os

import torch

from videoqa.video import DataError

# What stands before the video and between video and question, and after the question. The systems' texts are
# those their models were tuned with (LLaVA-1.5, LLaMA-2-chat, ChatML).
TEMPLATES = {
    "vicuna_v1": (
        "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful,"
        " detailed, and polite answers to the user's questions. USER: ",
        "\n",
        " ASSISTANT:",
    ),
    "llama-2": (
        "[INST] <<SYS>>\nYou are a helpful language and vision assistant. You are able to understand the"
        " visual content that the user provides, and assist the user with a variety of tasks using natural"
        " language."
        "\n<</SYS>>\n\n",
        "\n",
        " [/INST]",
    ),
    "chatml": (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n",
        "\n",
        "<|im_end|>\n<|im_start|>assistant\n",
    ),
    "plain": ("", "\n", "\n"),
}
END_TOKENS = ("</s>", "<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|end_of_text|>")


class ChatTokenizer:
    """A pretrained decoder's tokenizer.json, by the `tokenizers` package, with a conversation template.

    placeholder_id: config.json's image_token_index, which stands for one video token. Where tokenizer.json
    knows that id its text is part of what is tokenised, so the result is AutoTokenizer's; where it does not,
    what stands before and after the video is tokenised apart, as LLaVA's own code does. None, for a text
    decoder, becomes V: behind the last row of the embedding, so that no text and no draw can ever give it.
    think: whether the answer format that `build_prompt` tells the model has a think part.
    """

    instructed = True  # every prompt tells the answer format

    def __init__(self, folder: str, template: str, placeholder_id: int | None, V: int, think: bool = False):
        path = os.path.join(folder, "tokenizer.json")
        try:
            import tokenizers
        except ImportError as error:
            raise DataError(f"{path}: needs the package tokenizers: pip install tokenizers") from error
        if not os.path.isfile(path):
            raise DataError(f"{path}: no such file; copy the checkpoint's tokenizer.json there")
        try:
            self.tokenizer = tokenizers.Tokenizer.from_file(path)
        except Exception as error:  # the package raises no class of its own
            raise DataError(f"{path}: {str(error).splitlines()[0]}; copy the file again") from error
        self.tokenizer.no_padding()
        self.tokenizer.no_truncation()
        self.vocab_size = 1 + max(self.tokenizer.get_vocab(with_added_tokens=True).values())
        highest = max(self.vocab_size - 1, placeholder_id or 0)
        if highest >= V:
            raise DataError(f"{path}: id {highest} exceeds the embedding's {V} rows; use files of one model")
        placeholder_id = V if placeholder_id is None else placeholder_id
        special = {i: t.content for i, t in self.tokenizer.get_added_tokens_decoder().items() if t.special}
        self.end_ids = tuple(i for i, text in special.items() if text in END_TOKENS)
        if not self.end_ids:
            raise DataError(f"{path}: no end token; it needs one of {', '.join(END_TOKENS)}")
        self.special_texts = set(special.values()) | {self.tokenizer.id_to_token(placeholder_id) or "<image>"}
        self.banned = (set(special) | {placeholder_id}) - set(self.end_ids)
        self.before, self.between, self.after = TEMPLATES[template]
        self.placeholder_id, self.think = placeholder_id, think
        self.video_start = self.prompt("", 1).index(placeholder_id)

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True).strip()

    def banned_ids(self, V: int) -> torch.Tensor:
        """(V,) bool: never to be produced: special ids but the ends, the placeholder, unused rows."""
        ids = torch.arange(V)
        return torch.isin(ids, torch.tensor(sorted(self.banned))) | (ids >= self.vocab_size)

    def prompt(self, text: str, num_video_tokens: int) -> list[int]:
        """Ids of the conversation, the placeholder repeated. DataError: text holds a special token."""
        odd = next((token for token in sorted(self.special_texts) if token in text), None)
        if odd is not None:
            raise DataError(f"question {json.dumps(text[:60])}: holds the special token {odd}; take it out")
        video = [self.placeholder_id] * num_video_tokens
        name, after = self.tokenizer.id_to_token(self.placeholder_id), self.between + text + self.after
        if name is None:
            return self.tokenizer.encode(self.before).ids + video + self.encode(after)
        ids = self.tokenizer.encode(self.before + name + after).ids
        place = ids.index(self.placeholder_id)
        return ids[:place] + video + ids[place + 1 :]
