"""GET /v1/models and GET /v1/models/{model}."""

from fastapi import Request
from starlette.responses import Response

from xlinfer.serve.errors import ServingError, json_response
from xlinfer.serve.server import Server


async def list_models(server: Server, request: Request) -> Response:
    models = [_card(server, name) for name in server.options.served_model_names]
    return json_response({"object": "list", "data": models})


async def get_model(server: Server, request: Request) -> Response:
    name = request.path_params["model"]
    if name not in server.options.served_model_names:
        raise ServingError(404, f"The model `{name}` does not exist.", param="model")
    return json_response(_card(server, name))


def _card(server: Server, name: str) -> dict:
    loaded = server.engine.ready.done()
    return {
        "id": name,
        "object": "model",
        "created": server.options.created,
        "owned_by": "xlinfer",
        "root": server.options.model_root,
        "parent": None,
        "max_model_len": server.plan.max_model_len if loaded else None,
        "permission": [],
    }
