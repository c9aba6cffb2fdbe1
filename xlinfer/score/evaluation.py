"""The model `xlinfer` of lm-evaluation-harness: importing this registers it."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
from tqdm import tqdm

from xlinfer.request import SamplingParams
from xlinfer.score.pairs import Pair, encode, prefix_token
from xlinfer.score.rows import Row
from xlinfer.score.scorer import score
from xlinfer.score.tasks.loglikelihood import scored
from xlinfer.score.tasks.perplexity import windows
from xlinfer.score.work import Read, Work, Written, logprobs_of, request_id
from xlinfer.serve.llm import LLM
from xlinfer.serve.text import TextRequest


class XlinferLM(TemplateLM):
    """`pretrained` is what `xlinfer.LLM` takes as its model, or an LLM that is there already; the
    rest of the harness's model_args are LLM's own arguments. The harness always sends a batch size
    and a device (its own cuda:0 where it is not told): the engine fills its steps itself, and
    JAX_PLATFORMS chooses the device.

    max_length: tokens of context and continuation together; by default the model's.  max_gen_toks:
    of answers whose task does not say.  prefix_token_id: what stands before a text without context;
    by default BOS, or else EOS.  add_bos_token: whether the tokenizer adds its special tokens; by
    default as tokenizer.json says.
    """

    def __init__(
        self,
        pretrained: str | LLM,
        *,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        prefix_token_id: int | None = None,
        add_bos_token: bool | None = None,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        device: str | None = None,
        **engine: Any,
    ):
        super().__init__()
        if isinstance(pretrained, LLM):
            if engine:
                raise ValueError(f"{', '.join(engine)}: the LLM that is given was built already")
            self._llm = pretrained
        else:
            self._llm = LLM(pretrained, **engine)
        self._built = self._llm.built
        most = self._built.engine.plan.max_model_len
        if max_length is not None and not 2 <= max_length <= most:
            raise ValueError(f"max_length must be from 2 to the model's {most}, got {max_length}")
        self.max_length, self.max_gen_toks = max_length or most, max_gen_toks
        self._prefix, self._special = prefix_token_id, add_bos_token

    @property
    def eot_token_id(self) -> int:
        return self._built.generation.eos_token_ids[0]

    @property
    def prefix_token_id(self) -> int:
        return prefix_token(self._built.generation) if self._prefix is None else self._prefix

    @property
    def tokenizer_name(self) -> str:
        return f"xlinfer-{self._built.tokenizer.vocab_size}"

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        template = self._built.tokenizer.chat_template
        return None if template is None or not chat_template else template.source

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        return self._llm.render(
            chat_history,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs
    ) -> list[int]:
        special = self._special if add_special_tokens is None else add_special_tokens
        tokenizer = self._built.tokenizer
        if special is not None:
            return tokenizer.encode(string, add_special_tokens=special)
        bos = tokenizer.decode([self.prefix_token_id], skip_special_tokens=False)
        return encode(tokenizer, [string], bos)[0]

    def _loglikelihood_tokens(self, requests, disable_tqdm: bool = False, **kwargs):
        def work(row: Row) -> Work:
            _, context, continuation = requests[row.number]
            tokens = (*context, *continuation)[-self.max_length :]
            start = len(tokens) - len(continuation)
            if start < 1:
                raise ValueError(
                    f"a continuation of {len(continuation)} tokens and one before it do not fit "
                    f"max_length={self.max_length}"
                )
            pair = Pair(tokens, start)
            return Read(
                row, [scored(request_id(row), pair)], lambda out: {"is": logprobs_of(out[0])}
            )

        results: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        for number, found in self._run(range(len(requests)), work, "loglikelihood", disable_tqdm):
            results[number] = found["is"].sum, found["is"].is_greedy
            if (key := requests[number][0]) is not None:
                self.cache_hook.add_partial("loglikelihood", key, results[number])
        return results

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        texts = [self.tok_encode(request.args[0]) for request in requests]

        def work(row: Row) -> Work:
            tokens = (self.prefix_token_id, *texts[row.number])
            parts = windows(tokens, self.max_length, self.max_length - 1)
            asked = [scored(request_id(row, n), part) for n, part in enumerate(parts)]
            return Read(row, asked, lambda out: {"is": sum(logprobs_of(o).sum for o in out)})

        results = [0.0] * len(requests)  # of a text without tokens
        some = [n for n, tokens in enumerate(texts) if tokens]
        for number, found in self._run(some, work, "loglikelihood_rolling", disable_tqdm):
            results[number] = found["is"]
            args = requests[number].args
            self.cache_hook.add_partial("loglikelihood_rolling", args, results[number])
        return results

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        def work(row: Row) -> Work:
            context, asked = _arguments(requests[row.number])
            sampling = self._sampling(asked)
            room = self.max_length - (sampling.max_tokens or 0)
            if room < 1:
                raise ValueError(
                    f"max_gen_toks={sampling.max_tokens} leaves no room for a prompt in "
                    f"max_length={self.max_length}"
                )
            text = TextRequest(
                str(row.number), self.tok_encode(context)[-room:], sampling,
                tokenizer=self._built.tokenizer,
                eos_token_ids=self._built.generation.eos_token_ids,
                decoder_start=self._built.generation.decoder_start_token_ids,
            )  # fmt: skip
            return Written(row, text, lambda text: {"is": text.answers[0].text})

        results = [""] * len(requests)
        for number, found in self._run(range(len(requests)), work, "generate_until", disable_tqdm):
            context, asked = _arguments(requests[number])
            stop = normalize_gen_kwargs(asked).get("until")
            results[number] = postprocess_generated_text(found["is"], stop, None)
            self.cache_hook.add_partial("generate_until", (context, asked), results[number])
        return results

    def _sampling(self, asked: dict) -> SamplingParams:
        """Raises ValueError naming what the engine does not know."""
        known: dict[str, Any] = {**normalize_gen_kwargs(asked, self.max_gen_toks)}
        known["stop"] = [text for text in known.pop("until") if text]
        known["max_tokens"] = known.pop("max_gen_toks")
        if not known.pop("do_sample"):
            known["temperature"] = 0.0
        if unknown := sorted(known.keys() - SamplingParams.__dataclass_fields__.keys()):
            raise ValueError(f"generation_kwargs: {', '.join(unknown)} are not sampling parameters")
        return SamplingParams(**known)

    def _run(
        self, numbers: Sequence[int], work: Callable[[Row], Work], what: str, disable_tqdm: bool
    ) -> Iterator[tuple[int, Any]]:
        """(request's number, what `work` made of it), as they finish."""

        def prepare(rows: Sequence[Row]) -> list:
            return [work(row) for row in rows]

        rows = (Row(number=n, id=str(n), values={}) for n in numbers)
        results = score(self._built.engine, prepare, rows)
        for row, result, _ in tqdm(results, total=len(numbers), desc=what, disable=disable_tqdm):
            if isinstance(result, Exception):
                raise result
            yield row.number, result


def _arguments(request: Instance) -> tuple[str, Any]:
    context, asked = request.args  # type: ignore[misc]
    return context, asked


register_model("xlinfer")(XlinferLM)  # as a decorator it would hide the type
