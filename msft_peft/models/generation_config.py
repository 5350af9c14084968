"""What `generate` can be told, under HF's names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

# What HF's GenerationConfig has beside, and the value, other than None, at which it asks for nothing.
_HF_ONLY: tuple[tuple[Any, str], ...] = (
    (None, "assistant_early_exit bad_words_ids begin_suppress_tokens cache_config cache_implementation"),
    (None, "compile_config constraints dola_layers exponential_decay_length_penalty force_words_ids"),
    (None, "forced_bos_token_id forced_eos_token_id max_matching_ngram_size max_time prefill_chunk_size"),
    (None, "prompt_lookup_num_tokens return_legacy_cache sequence_bias stop_strings suppress_tokens"),
    (None, "watermarking_config"),
    (False, "low_memory output_attentions output_hidden_states output_logits output_scores remove_invalid_values"),
    (False, "renormalize_logits return_dict_in_generate token_healing"),
    (True, "use_cache"),
    (0.0, "diversity_penalty encoder_no_repeat_ngram_size epsilon_cutoff eta_cutoff min_p penalty_alpha"),
    (1.0, "encoder_repetition_penalty guidance_scale num_beam_groups typical_p"),
)
_NEUTRAL = {name: value for value, names in _HF_ONLY for name in names.split()}
# Of no meaning here, whatever they say.
_HARMLESS = {*"_from_model_config bos_token_id disable_compile is_assistant target_lookbehind".split()}
_HARMLESS |= {*"transformers_version assistant_lookbehind assistant_confidence_threshold".split()}
_HARMLESS |= {*"num_assistant_tokens num_assistant_tokens_schedule".split()}
_NONE_MEANS = {"top_k": 0, "eos_token_id": ()}


@dataclass
class GenerationConfig:
    """How `generate` continues a text.

    Attributes:
        max_new_tokens: how many tokens to add at most; default 20 if there is no `max_length` either.
        max_length: how long prompt and continuation may be; `max_new_tokens` goes first.
        min_new_tokens: no text ends before so many tokens were added.
        min_length: no text ends before prompt and continuation are so long.
        do_sample: draw the tokens; otherwise take the most probable ones, whatever the next three fields say.
        temperature: the scores are divided by it.
        top_k: draw from so many of the most probable tokens; 0 or None for all.
        top_p: draw from the fewest tokens that together have this probability (Holtzman et al. 2020,
            arXiv:1904.09751).
        num_beams: above 1, search for the continuation of the highest score among so many at a time.
        length_penalty: a finished beam's log probability is divided by its length to this power: above 0 favours
            long texts, below 0 short ones (Wu et al. 2016, arXiv:1609.08144, §7).
        early_stopping: when to end a beam search: True, as soon as `num_beams` texts have ended; False, when the best
            running beam, at its present length, is not better than the worst of those; "never", when it cannot
            become better at any length.
        num_return_sequences: how many continuations of each prompt to return: draws, or the best beams.
        repetition_penalty: above 1 makes tokens that already occur less probable (Keskar et al. 2019,
            arXiv:1909.05858, §4.1).
        no_repeat_ngram_size: no sequence of so many tokens occurs twice in a text; 0 allows it.
        eos_token_id: the token, or any of the tokens, that ends a text; default: the model config's; None: no token.
        pad_token_id: what follows the end in the result; default: the model config's, or the first eos token.
        decoder_start_token_id: what an encoder-decoder begins with; default: the model config's, or its bos token.
        seed: makes the draws repeat; default: they follow `mindspore.set_seed`.

    Raises:
        ValueError: a value out of range, or values that exclude each other.
    """

    max_new_tokens: int | None = None
    max_length: int | None = None
    min_new_tokens: int | None = None
    min_length: int = 0
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 50
    top_p: float = 1.0
    num_beams: int = 1
    length_penalty: float = 1.0
    early_stopping: bool | str = False
    num_return_sequences: int = 1
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    eos_token_id: int | Iterable[int] = field(default_factory=tuple)
    pad_token_id: int | None = None
    decoder_start_token_id: int | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        ends = self.eos_token_id
        self.ends = [int(ends)] if isinstance(ends, int) else [int(end) for end in ends]
        self._check()

    def _check(self) -> None:
        for name, good, want in (
            ("temperature", self.temperature > 0, "> 0 (for the most probable token: do_sample=False)"),
            ("top_k", self.top_k >= 0, ">= 0"),
            ("top_p", 0 < self.top_p <= 1, "in (0, 1]"),
            ("repetition_penalty", self.repetition_penalty > 0, "> 0"),
            ("no_repeat_ngram_size", self.no_repeat_ngram_size >= 0, ">= 0"),
            ("num_beams", self.num_beams >= 1, ">= 1"),
            ("num_return_sequences", self.num_return_sequences >= 1, ">= 1"),
            ("min_length", self.min_length >= 0, ">= 0"),
            ("min_new_tokens", (self.min_new_tokens or 0) >= 0, ">= 0"),
            ("early_stopping", self.early_stopping in (True, False, "never"), "True, False or 'never'"),
        ):
            if not good:
                raise ValueError(f"generate: {name}={getattr(self, name)!r} should be {want}.")
        if self.do_sample and self.num_beams > 1:
            raise ValueError(
                f"generate: do_sample=True with num_beams={self.num_beams} is not built. Draw several texts with "
                f"num_return_sequences, or search with do_sample=False."
            )
        if self.num_return_sequences > self.num_beams and not self.do_sample:
            raise ValueError(
                f"generate: num_return_sequences={self.num_return_sequences} should be at most num_beams="
                f"{self.num_beams}, unless do_sample=True: without draws all of them would be equal."
            )

    @property
    def rows(self) -> int:
        """How many texts of each prompt run at a time."""
        return self.num_return_sequences if self.num_beams == 1 else self.num_beams

    @property
    def pad(self) -> int:
        """What follows the end of a text."""
        if self.pad_token_id is not None:
            return self.pad_token_id
        return self.ends[0] if self.ends else 0

    def count_new(self, prompt: int) -> int:
        """Return how many tokens may be added to a prompt of that length.

        Raises:
            ValueError: none can.
        """
        new = self.max_new_tokens
        if new is None:
            new = 20 if self.max_length is None else self.max_length - prompt
        if new < 1:
            raise ValueError(
                f"generate would add {new} tokens to a prompt of {prompt}: raise max_length or max_new_tokens."
            )
        return new

    @classmethod
    def of(cls, model_config: Any, given: Any, options: Mapping[str, Any]) -> GenerationConfig:
        """Put together what a call of `generate` asks for.

        Args:
            model_config: tells the special tokens where nothing else does.
            given: a `generation_config`: a dict, an object with `to_dict()` such as HF's, or None. None in it means
                that it leaves the value open.
            options: the call's own arguments, which win.

        Raises:
            TypeError: an option that there is not; all are named.
            NotImplementedError: an option of HF's that is not built here, unless it has no effect.
        """
        values = {
            name: value
            for name in ("eos_token_id", "pad_token_id", "decoder_start_token_id")
            if (value := model_config.get(name)) is not None
        }
        if given is not None:
            found = given if isinstance(given, Mapping) else given.to_dict()
            values |= {name: value for name, value in found.items() if value is not None}
        values |= options
        known = {one.name: one.default for one in fields(cls)}
        unknown = sorted(name for name in values if name not in known and name not in {*_NEUTRAL, *_HARMLESS})
        if unknown:
            raise TypeError(
                f"generate got {unknown}, which it does not have. It takes {', '.join(sorted(known))}, beside the "
                f"inputs."
            )
        for name, value in values.items():
            if name in _NEUTRAL and value is not None and value != _NEUTRAL[name]:
                raise NotImplementedError(f"generate: {name}={value!r} is not built here; leave it out.")
        chosen = {name: value for name, value in values.items() if name in known}
        for name, value in chosen.items():
            if value is None:
                chosen[name] = _NONE_MEANS.get(name, known[name])
        return cls(**chosen)
