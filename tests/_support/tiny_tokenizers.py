"""Tiny real tokenizers of every kind that pipelines use, trained on a few sentences."""

from __future__ import annotations

from functools import cache
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

CORPUS = [
    "a red cube and a blue ball on the green grass, next to a small house",
    "A Red cube. A Blue ball! blurry low quality image of a house",
    "Generate an image according to the following instructions",
    "Describe the image by detailing the color, shape, size, texture",
    "the cafe is red, the naive ball is blue",
] * 4
_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
_CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['content'] is string %}{{ m['content'] }}"
    "{% else %}{% for part in m['content'] %}{{ part['text'] }}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_ALPHABET = pre_tokenizers.ByteLevel.alphabet()


def clip(length: int = 77) -> Any:
    """Byte-level BPE of lower-case words that end in ``</w>``."""
    made = Tokenizer(models.BPE(unk_token="<|endoftext|>", end_of_word_suffix="</w>", continuing_subword_prefix=""))
    made.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(_WORDS), "removed", invert=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    special = ["<|startoftext|>", "<|endoftext|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=900, special_tokens=special, initial_alphabet=_ALPHABET, end_of_word_suffix="</w>"
    )
    _train(made, trainer)
    _frame(made, "<|startoftext|> $A <|endoftext|>", special)
    return _fast(made, length, bos_token=special[0], eos_token=special[1], pad_token=special[1])


def t5(length: int = 512) -> Any:
    """Unigram of words that begin with ``▁``, on normalized white space; UMT5 is of this kind too."""
    made = Tokenizer(models.Unigram())
    made.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")])
    made.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    special = ["<pad>", "</s>", "<unk>"]
    _train(made, trainers.UnigramTrainer(vocab_size=160, special_tokens=special, unk_token="<unk>"))
    _frame(made, "$A </s>", special)
    return _fast(made, length, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def qwen(length: int = 1024, side: str = "right") -> Any:
    """Byte-level BPE with the space before a word, no token at the start, a chat template."""
    made = Tokenizer(models.BPE(byte_fallback=False))
    made.normalizer = normalizers.NFC()
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(rf" ?[\p{{L}}]+|{_WORDS}|\s+"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    _train(made, trainers.BpeTrainer(vocab_size=900, special_tokens=special, initial_alphabet=_ALPHABET))
    made.post_processor = processors.ByteLevel(trim_offsets=False)
    fast = _fast(made, length, pad_token=special[0], eos_token=special[2], padding_side=side)
    fast.chat_template = _CHAT
    return fast


def llama3(length: int = 1024) -> Any:
    """Byte-level BPE with a token at the start."""
    fast = qwen(length)
    made = fast.backend_tokenizer
    made.add_special_tokens(["<|begin_of_text|>"])
    _frame(made, "<|begin_of_text|> $A", ["<|begin_of_text|>"])
    return _fast(made, length, bos_token="<|begin_of_text|>", pad_token="<|endoftext|>")


def llama(length: int = 1024, side: str = "left", prepend: bool = True) -> Any:
    """BPE of sentencepiece with byte fallback, ``▁`` before the text: Llama 2 and Phi 3; without it, Gemma."""
    made = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    steps: list[Any] = [normalizers.Prepend("▁")] if prepend else []
    made.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    made.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    _train(made, trainers.BpeTrainer(vocab_size=700, special_tokens=special))
    made.pre_tokenizer = None
    made.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    _frame(made, "<s> $A", special)
    fast = _fast(made, length, bos_token="<s>", eos_token="</s>", pad_token="</s>", padding_side=side)
    fast.chat_template = _CHAT
    return fast


def gemma(length: int = 1024, side: str = "right") -> Any:
    """As Llama 2, without ``▁`` before the text."""
    return llama(length, side, prepend=False)


def byt5(length: int = 256) -> Any:
    """Bytes; the only tokenizer of the pipelines that has no fast form."""
    return ByT5Tokenizer(model_max_length=length)


KINDS = {"clip": clip, "t5": t5, "qwen": qwen, "llama3": llama3, "llama": llama, "gemma": gemma, "byt5": byt5}


def _train(made: Tokenizer, trainer: Any) -> None:
    made.train_from_iterator(CORPUS, trainer)


def _frame(made: Tokenizer, template: str, special: list[str]) -> None:
    ids = [(token, made.token_to_id(token)) for token in special]
    made.post_processor = processors.TemplateProcessing(single=template, special_tokens=ids)


def _fast(made: Tokenizer, length: int, **more: Any) -> Any:
    return PreTrainedTokenizerFast(tokenizer_object=made, model_max_length=length, **more)


@cache
def tokenizer(kind: str) -> Any:
    """A tokenizer of a kind, built once."""
    return KINDS[kind]()
