"""Offline inference: prompts in, vLLM-shaped results out."""

import itertools
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from time import monotonic

from xlinfer.config import GenerationConfig
from xlinfer.progress import show_progress
from xlinfer.request import InvalidRequest, SamplingParams
from xlinfer.serve.build import Built, EngineOptions, build
from xlinfer.serve.chat_template import check_messages
from xlinfer.serve.text import RequestOutput, TextRequest, check_token_ids

Prompt = str | Mapping[str, object]


class LLM:
    """A model, its tokenizer and the engine, for use from one thread.

    `model` is a checkpoint folder, a GGUF, or "org/name" of the Hugging Face hub, at `revision`
    (branch, tag or commit), where nothing here has that name; `tokenizer` another folder to take
    the tokenizer from; `artifact` what xlinfer.compile wrote, which may hold the model too. The
    rest is as the server's flags of the same names say; None lets the plan decide. Raises
    ValueError or OSError saying which argument is wrong.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | None = None,
        *,
        revision: str | None = None,
        tokenizer: str | os.PathLike[str] | None = None,
        chat_template: str | os.PathLike[str] | None = None,
        text_only: bool = False,
        dtype: str = "auto",
        max_model_len: int | None = None,
        max_num_seqs: int | None = None,
        max_num_batched_tokens: int | None = None,
        page_size: int | None = None,
        num_pages: int | None = None,
        hbm_utilization: float = 0.9,
        tensor_parallel_size: int = 1,
        data_parallel_size: int = 1,
        expert_parallel_size: int | None = None,
        sequence_parallel_size: int = 1,
        quantization: str | None = None,
        attention_impl: str | None = None,
        matmul_impl: str | None = None,
        kv_cache_dtype: str = "auto",
        enable_prefix_caching: bool = True,
        deterministic: bool = False,
        max_logprobs: int = 20,
        seed: int = 0,
        compile_cache_dir: str | os.PathLike[str] | None = None,
        artifact: str | os.PathLike[str] | None = None,
        allow_recompile: bool = False,
    ):
        if model is None and artifact is None:
            raise ValueError("model is missing: name a checkpoint folder, or an artifact")
        options = EngineOptions(
            model=None if model is None else os.fspath(model),
            revision=revision,
            tokenizer=None if tokenizer is None else os.fspath(tokenizer),
            chat_template=None if chat_template is None else os.fspath(chat_template),
            text_only=text_only,
            dtype=dtype,
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            page_size=page_size,
            num_pages=num_pages,
            hbm_utilization=hbm_utilization,
            tensor_parallel_size=tensor_parallel_size,
            data_parallel_size=data_parallel_size,
            expert_parallel_size=expert_parallel_size,
            sequence_parallel_size=sequence_parallel_size,
            quantization=quantization,
            attention_impl=attention_impl,
            matmul_impl=matmul_impl,
            kv_cache_dtype=kv_cache_dtype,
            enable_prefix_caching=enable_prefix_caching,
            deterministic=deterministic,
            max_logprobs=max_logprobs,
            seed=seed,
            compile_cache_dir=None if compile_cache_dir is None else os.fspath(compile_cache_dir),
            artifact=None if artifact is None else os.fspath(artifact),
            allow_recompile=allow_recompile,
        )
        with show_progress() as progress:
            self._use(build(options, progress))

    @classmethod
    def over(cls, built: Built) -> "LLM":
        """An LLM over an engine and a tokenizer that exist already."""
        llm = cls.__new__(cls)
        llm._use(built)
        return llm

    def _use(self, built: Built) -> None:
        self.built = built
        self.engine, self.tokenizer = built.engine, built.tokenizer
        self._generation = built.generation
        self._ids = itertools.count()

    def default_sampling_params(self) -> SamplingParams:
        """What the model's generation_config.json asks for; 16 tokens when it does not say."""
        return default_sampling_params(self._generation)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
        priority: Sequence[int] | None = None,
    ) -> list[RequestOutput]:
        """Answers in the order of `prompts`: a text, {"prompt": text},
        {"prompt_token_ids": [ids]}, or a list of these.

        One `sampling_params` for all or one for each; None takes the model's defaults. Lower
        `priority` runs first. Raises InvalidRequest, before anything runs, if any prompt or
        parameter is bad. `use_tqdm` shows progress, on a terminal.
        """
        listed = [prompts] if isinstance(prompts, str | Mapping) else list(prompts)
        if any(isinstance(prompt, int) for prompt in listed):
            raise InvalidRequest(
                "prompts",
                "prompts is a list of integers, which could be one prompt or many: "
                'write {"prompt_token_ids": [...]}.',
            )
        inputs = [self._input(prompt, f"prompts[{n}]") for n, prompt in enumerate(listed)]
        return self._run(inputs, sampling_params, use_tqdm, priority)

    def chat(
        self,
        messages: Sequence[Mapping[str, object]] | Sequence[Sequence[Mapping[str, object]]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        chat_template_kwargs: Mapping[str, object] | None = None,
    ) -> list[RequestOutput]:
        """Answers to one conversation or a list of them, each a list of
        {"role": ..., "content": ...}. As `generate` otherwise."""
        single = bool(messages) and isinstance(messages[0], Mapping)
        inputs = []
        for conversation in [messages] if single else messages:
            text = self.render(
                conversation,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                chat_template_kwargs=chat_template_kwargs,
            )
            ids = self.tokenizer.encode(text, add_special_tokens=False, param="messages")
            inputs.append((text, ids))
        return self._run(inputs, sampling_params, use_tqdm, None)

    def render(
        self,
        messages: object,
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        chat_template_kwargs: Mapping[str, object] | None = None,
    ) -> str:
        """What the chat template makes of one conversation. Raises InvalidRequest."""
        if (template := self.tokenizer.chat_template) is None:
            raise InvalidRequest(
                "messages", "The model has no chat template: pass chat_template= to LLM."
            )
        checked, _ = check_messages(messages)
        return template.render(
            checked,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            kwargs=chat_template_kwargs,
        )

    def _input(self, prompt: object, where: str) -> tuple[str | None, list[int]]:
        match prompt:
            case str(text) | {"prompt": str(text)}:
                return text, self.tokenizer.encode(text, param=where)
            case {"prompt_token_ids": [*ids]}:
                check_token_ids(ids, self.engine.vocab_size, f"{where}.prompt_token_ids")
                return None, ids
        raise InvalidRequest(
            where,
            f'{where} must be a string, {{"prompt": text}} or {{"prompt_token_ids": [ids]}}, '
            f"got {type(prompt).__name__}.",
        )

    def _run(self, inputs, sampling_params, use_tqdm, priority) -> list[RequestOutput]:
        params = _one_each("sampling_params", sampling_params, len(inputs), SamplingParams)
        priorities = _one_each("priority", priority, len(inputs), int)
        default = self.default_sampling_params()
        texts = [
            TextRequest(
                str(next(self._ids)),
                ids,
                params[n] or default,
                tokenizer=self.tokenizer,
                eos_token_ids=self._generation.eos_token_ids,
                decoder_start=self._generation.decoder_start_token_ids,
                prompt=prompt,
                priority=priorities[n] or 0,
                arrival_time=monotonic(),
            )
            for n, (prompt, ids) in enumerate(inputs)
        ]
        owner = {request.request_id: text for text in texts for request in text.requests}
        try:
            for n, text in enumerate(texts):
                for request in text.requests:
                    try:
                        self.engine.add_request(request)
                    except InvalidRequest as error:
                        raise InvalidRequest(error.param, f"prompts[{n}]: {error}") from None
            self._finish(texts, owner, use_tqdm)
        finally:  # an interrupt or an error leaves nothing running; normally there is nothing left
            self.engine.abort([id for text in texts for id in text.unfinished_ids])
        return [text.output() for text in texts]

    def _finish(self, texts: list[TextRequest], owner: dict, use_tqdm: bool) -> None:
        unfinished, tokens = {text.request_id for text in texts}, 0
        with _display(len(texts), use_tqdm) as show:
            while unfinished:
                for output in self.engine.step():
                    if (text := owner.get(output.request_id)) is None:
                        continue  # of an earlier call that was interrupted
                    delta, abort = text.add(output)
                    tokens += len(delta.token_ids)
                    if abort:
                        self.engine.abort([output.request_id])
                    if text.finished:
                        unfinished.discard(text.request_id)
                show(len(texts) - len(unfinished), tokens)


def default_sampling_params(generation: GenerationConfig) -> SamplingParams:
    """generation_config.json's values, SamplingParams' own where it is silent."""
    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
    given = {name: getattr(generation, name) for name in names}
    given["max_tokens"] = generation.max_new_tokens
    return SamplingParams(**{name: value for name, value in given.items() if value is not None})


def _one_each(name: str, values: object, count: int, kind: type) -> list:
    if values is None or isinstance(values, SamplingParams):
        return [values] * count
    if not isinstance(values, Sequence) or len(values) != count:
        raise InvalidRequest(name, f"{name} must be one for all prompts or a list of {count}.")
    for value in values:
        if not isinstance(value, kind):
            raise InvalidRequest(name, f"{name} must hold {kind.__name__}, got {value!r}.")
    return list(values)


@contextmanager
def _display(total: int, wanted: bool) -> Iterator:
    if not wanted or not sys.stderr.isatty():
        yield lambda done, tokens: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = [TextColumn("Prompts"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()]
    speed = TextColumn("{task.fields[tokens_per_s]:,.0f} tokens/s")
    with Progress(*columns, speed, console=Console(file=sys.stderr)) as bars:
        task, start = bars.add_task("", total=total, tokens_per_s=0.0), monotonic()

        def show(done: int, tokens: int) -> None:
            rate = tokens / max(monotonic() - start, 1e-9)
            bars.update(task, completed=done, tokens_per_s=rate)

        yield show
