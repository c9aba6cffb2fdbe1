"""POST /v1/embeddings: pooled hidden states."""

import base64
from time import monotonic

import numpy as np
from fastapi import Request
from starlette.responses import Response

from xlinfer.request import InvalidRequest, SamplingParams
from xlinfer.serve.completions import prompt_ids, read_prompts
from xlinfer.serve.errors import json_response
from xlinfer.serve.jobs import start_job, unless_gone
from xlinfer.serve.params import truncated
from xlinfer.serve.protocol import EmbeddingBody
from xlinfer.serve.responses import new_id
from xlinfer.serve.server import Server, off_loop, too_long
from xlinfer.serve.text import TextRequest


async def create_embedding(server: Server, request: Request) -> Response:
    body = await server.read(request, EmbeddingBody)
    arrival = monotonic()
    if body.encoding_format not in (None, "float", "base64"):
        message = f"encoding_format must be 'float' or 'base64', got {body.encoding_format!r}."
        raise InvalidRequest("encoding_format", message)
    prompts = read_prompts(body.input, "input")
    server.engine.check_room(1)
    salt = server.cache_salt(request, body.cache_salt)
    texts = []
    for prompt in prompts:
        ids = truncated(
            server, await prompt_ids(server, body, prompt, "input"), body, max_tokens=None
        )
        if len(ids) > (most := server.plan.max_model_len):
            raise too_long(most, len(ids), "input")
        texts.append(
            TextRequest(
                new_id(),
                ids,
                SamplingParams(),
                tokenizer=server.tokenizer,
                pooling=server.options.pooling,
                priority=body.priority or 0,
                arrival_time=arrival,
                cache_salt=salt,
            )
        )
    job = await start_job(server.engine, texts, stream=False)
    try:
        await unless_gone(request, job.finished())
    finally:
        job.close()
    model = body.model or server.options.served_model_names[0]
    return json_response(await off_loop(lambda: _whole(texts, body, model), 4096 * len(texts)))


def finished(pooled_D: np.ndarray, dimensions: int | None, *, normalize: bool) -> np.ndarray:
    """What a client is given of pooled hidden states: float32, the first `dimensions`, of length 1
    if `normalize`. Raises InvalidRequest naming `dimensions`."""
    if dimensions is not None and not 1 <= dimensions <= len(pooled_D):
        raise InvalidRequest(
            "dimensions",
            f"dimensions must be from 1 to {len(pooled_D)} for this model, got {dimensions}.",
        )
    kept_D = pooled_D[:dimensions].astype(np.float64)
    if normalize:
        kept_D /= max(float(np.linalg.norm(kept_D)), 1e-12)
    return kept_D.astype(np.float32)


def _whole(texts: list[TextRequest], body: EmbeddingBody, model: str) -> dict:
    data = []
    for index, text in enumerate(texts):
        assert text.pooled is not None
        vector = finished(text.pooled, body.dimensions, normalize=body.normalize is not False)
        if body.encoding_format == "base64":  # little-endian float32, as OpenAI has it
            value = base64.b64encode(vector.astype("<f4").tobytes()).decode()
        else:
            value = vector.tolist()
        data.append({"object": "embedding", "index": index, "embedding": value})
    tokens = sum(len(text.prompt_token_ids) for text in texts)
    counts = {"prompt_tokens": tokens, "total_tokens": tokens}
    return {"object": "list", "data": data, "model": model, "usage": counts}
