"""Every refusal has a status, one body, and says what and where."""

import re
from collections.abc import Iterator
from http import HTTPStatus

import pytest
from fastapi import FastAPI
from pydantic import BaseModel
from sqlalchemy.exc import TimeoutError as PoolTimeout
from starlette.testclient import TestClient

from hub import errors
from hub.errors import HubError, status_of
from merge.errors import BadRecipe, ShapeMismatch


def leaves(cls: type[HubError]) -> Iterator[type[HubError]]:
    for child in cls.__subclasses__():
        if child.__module__ == "hub.errors" and not child.__name__.startswith("_"):
            yield child
            yield from leaves(child)


@pytest.mark.parametrize("error", list(leaves(HubError)))
def test_every_error_has_a_status_and_stands_in_the_tree(error: type[HubError]) -> None:
    assert 400 <= status_of(error) <= 599
    assert re.search(rf"\b{error.__name__}\b", errors.__doc__ or "")


@pytest.fixture
def client() -> TestClient:
    class Body(BaseModel):
        n: int

    app = FastAPI()
    errors.install(app, renderers={"plain": lambda r, e, s: errors.JSONResponse(e.message, s)})

    @app.get("/hub")
    def hub_error() -> None:
        raise errors.BadPath("a/../b: no", "path")

    @app.get("/facade", tags=["plain"])
    def facade_error() -> None:
        raise errors.BadPath("a/../b: no", "path")

    @app.get("/recipe")
    def recipe_error() -> None:
        raise BadRecipe("inputs.0.strength", "is not a number")

    @app.get("/shape")
    def shape_error() -> None:
        raise ShapeMismatch("ink.safetensors", "unet.to_q", "down is (4, 3), up is (2, 5)")

    @app.post("/body")
    def body(body: Body) -> None: ...

    @app.get("/busy")
    def busy() -> None:
        raise PoolTimeout("QueuePool limit")

    @app.get("/token")
    def token() -> None:
        raise errors.Unauthorized("no token")

    return TestClient(app)


def error_of(client: TestClient, method: str, path: str, **options: object) -> tuple[int, object]:
    response = client.request(method, path, **options)  # type: ignore[arg-type]
    body = response.json()
    assert body.keys() == {"error"}
    return response.status_code, body["error"]


def test_an_error_of_the_hub_is_code_message_and_param(client: TestClient) -> None:
    assert error_of(client, "GET", "/hub") == (
        HTTPStatus.UNPROCESSABLE_ENTITY,
        {"code": "BadPath", "message": "a/../b: no", "param": "path"},
    )


def test_a_facade_renders_its_own_way(client: TestClient) -> None:
    response = client.get("/facade")
    assert (response.status_code, response.json()) == (422, "a/../b: no")


def test_an_error_of_the_engine_is_a_422_that_names_the_place(client: TestClient) -> None:
    status, error = error_of(client, "GET", "/recipe")
    assert status == 422
    assert error == {
        "code": "BadRecipe",
        "message": "recipe field inputs.0.strength: is not a number",
        "param": "inputs.0.strength",
    }
    status, error = error_of(client, "GET", "/shape")
    assert (status, error["param"]) == (422, "unet.to_q")  # type: ignore[index]


@pytest.mark.parametrize(
    ("body", "param"), [({"n": "x"}, "n"), ({}, "n"), ([], None)], ids=["type", "missing", "list"]
)
def test_a_wrong_field_is_named(client: TestClient, body: object, param: str | None) -> None:
    status, error = error_of(client, "POST", "/body", json=body)
    assert status == 422
    assert (error["code"], error["param"]) == ("BadField", param)  # type: ignore[index]


def test_a_body_that_is_no_json_is_said_to_be_none(client: TestClient) -> None:
    headers = {"Content-Type": "application/json"}
    status, error = error_of(client, "POST", "/body", content="garbage", headers=headers)
    assert (status, error["code"], error["param"]) == (422, "BadField", None)  # type: ignore[index]
    assert error["message"] == "the request is not JSON: Expecting value"  # type: ignore[index]


def test_routing_and_waiting_have_the_same_body(client: TestClient) -> None:
    assert error_of(client, "GET", "/nowhere")[0] == 404
    status, error = error_of(client, "DELETE", "/hub")
    assert (status, error["code"]) == (405, "MethodNotAllowed")  # type: ignore[index]
    status, error = error_of(client, "GET", "/busy")
    assert (status, error["code"]) == (503, "Busy")  # type: ignore[index]


def test_a_401_says_how_to_authenticate(client: TestClient) -> None:
    assert client.get("/token").headers["WWW-Authenticate"] == "Bearer"
