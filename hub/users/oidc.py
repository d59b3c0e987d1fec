"""OpenID Connect: the authorisation code flow with PKCE against one provider.

OpenID Connect Core 1.0 section 3.1, Discovery 1.0, RFC 7636 (S256), RFC 9207 (`iss` of answers).
Knows no users: it ends with whom the provider means.
"""

import base64
import hashlib
import secrets
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from hmac import compare_digest
from threading import Lock
from typing import Any
from urllib.parse import quote_plus, urlencode, urlsplit

import httpx2
from joserfc import jwt
from joserfc.errors import JoseError
from joserfc.jwk import KeySet

from hub.errors import ProviderFailed, SignInFailed

# Asymmetric only: with HS256 the client's secret would be a key that signs.
ALGORITHMS = ["RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "EdDSA"]
TIMEOUT_S = 10.0
MAX_BYTES = 1 << 20
KEEP_S = 3600
KEYS_AT_MOST_EVERY_S = 60
CLOCK_SKEW_S = 60


@dataclass(frozen=True, slots=True)
class Flow:
    """What one browser's attempt is bound to; it comes back in a signed cookie."""

    state: str
    nonce: str
    verifier: str
    next: str
    link: int | None = None  # the login that adds this identity to its user
    code: str = ""  # of an invitation

    def pack(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Person:
    """Whom the provider means. `issuer` and `subject` decide; the names are suggestions."""

    issuer: str
    subject: str
    name: str = ""
    full_name: str = ""

    def pack(self) -> dict[str, Any]:
        return asdict(self)


class Provider:
    """Its metadata and keys are fetched when they are needed and kept for an hour."""

    def __init__(self, issuer: str, client_id: str, client_secret: str | None) -> None:
        self.issuer = issuer
        self._client_id = client_id
        self._client_secret = client_secret
        self._lock = Lock()
        self._metadata: tuple[float, dict[str, Any]] | None = None
        self._keys: tuple[float, KeySet] | None = None

    def begin(
        self, redirect_uri: str, next: str, *, link: int | None = None, code: str = ""
    ) -> tuple[Flow, str]:
        """What to remember, and where to send the browser; ProviderFailed."""
        made = [secrets.token_urlsafe(32) for _ in range(3)]
        flow = Flow(made[0], made[1], made[2], next, link, code)
        challenge = hashlib.sha256(flow.verifier.encode()).digest()
        query = {
            "response_type": "code",
            "client_id": self._client_id,
            "redirect_uri": redirect_uri,
            "scope": "openid profile",
            "state": flow.state,
            "nonce": flow.nonce,
            "code_challenge": base64.urlsafe_b64encode(challenge).decode().rstrip("="),
            "code_challenge_method": "S256",
        }
        endpoint = self._endpoint("authorization_endpoint")
        return flow, f"{endpoint}{'&' if '?' in endpoint else '?'}{urlencode(query)}"

    def finish(self, flow: Flow, redirect_uri: str, answer: Mapping[str, str]) -> Person:
        """Whom the provider's answer is about; SignInFailed, ProviderFailed."""
        if not compare_digest(answer.get("state", "").encode(), flow.state.encode()):
            raise SignInFailed("This sign-in began in another browser, or too long ago")
        wants_issuer = self._known().get("authorization_response_iss_parameter_supported") is True
        if answer.get("iss", None if wants_issuer else self.issuer) != self.issuer:
            raise SignInFailed("The answer is from another provider")
        if "error" in answer or not answer.get("code"):
            raise SignInFailed("The provider did not sign you in")
        token = self._exchange(flow, redirect_uri, answer["code"])
        claims = self._claims(flow, token)
        return Person(
            self.issuer,
            claims["sub"],
            _text(claims.get("preferred_username")),
            _text(claims.get("name")),
        )

    def _exchange(self, flow: Flow, redirect_uri: str, code: str) -> str:
        data = {
            "grant_type": "authorization_code",
            "code": code,
            "redirect_uri": redirect_uri,
            "code_verifier": flow.verifier,
        }
        auth = None
        if self._client_secret is None:
            data["client_id"] = self._client_id
        elif "client_secret_basic" in self._known().get(
            "token_endpoint_auth_methods_supported", ["client_secret_basic"]
        ):
            # RFC 6749 section 2.3.1: both are form-encoded first.
            auth = (quote_plus(self._client_id), quote_plus(self._client_secret))
        else:
            data |= {"client_id": self._client_id, "client_secret": self._client_secret}
        answer = _json("POST", self._endpoint("token_endpoint"), data=data, auth=auth)
        token = answer.get("id_token")
        if not isinstance(token, str):
            raise ProviderFailed("the provider's answer holds no ID token")
        return token

    def _claims(self, flow: Flow, token: str) -> dict[str, Any]:
        """OpenID Connect Core 1.0 section 3.1.3.7."""
        must = jwt.JWTClaimsRegistry(
            leeway=CLOCK_SKEW_S,
            iss={"essential": True, "value": self.issuer},
            aud={"essential": True, "value": self._client_id},
            sub={"essential": True},
            exp={"essential": True},
            iat={"essential": True},
            nonce={"essential": True, "value": flow.nonce},
        )
        try:
            claims = self._verified(token)
            must.validate(claims)
        except (JoseError, ValueError) as error:
            raise SignInFailed(f"The provider's ID token is not valid: {error}") from error
        several = isinstance(claims["aud"], list) and len(claims["aud"]) > 1
        if claims.get("azp", None if several else self._client_id) != self._client_id:
            raise SignInFailed("The provider's ID token was made for another application")
        if not 1 <= len(claims["sub"]) <= 255:
            raise SignInFailed("The provider's ID token has no subject of 1 to 255 characters")
        return claims

    def _verified(self, token: str) -> dict[str, Any]:
        try:
            return jwt.decode(token, self._key_set(), algorithms=ALGORITHMS).claims
        except JoseError:
            # Providers change their keys; whoever sends many bad tokens fetches none.
            return jwt.decode(
                token, self._key_set(KEYS_AT_MOST_EVERY_S), algorithms=ALGORITHMS
            ).claims

    def _key_set(self, max_age_s: float = KEEP_S) -> KeySet:
        with self._lock:
            known = self._keys
        if known is not None and time.monotonic() - known[0] < max_age_s:
            return known[1]
        found = _json("GET", self._endpoint("jwks_uri"))
        try:
            keys = KeySet.import_key_set(found)  # type: ignore[arg-type]
        except (JoseError, ValueError, KeyError, TypeError) as error:
            raise ProviderFailed("the provider's keys cannot be read") from error
        with self._lock:
            self._keys = (time.monotonic(), keys)
        return keys

    def _endpoint(self, name: str) -> str:
        address = self._known().get(name)
        if not isinstance(address, str) or not is_safe(address):
            raise ProviderFailed(f"the provider names no usable {name}")
        return address

    def _known(self) -> dict[str, Any]:
        with self._lock:
            known = self._metadata
        if known is not None and time.monotonic() - known[0] < KEEP_S:
            return known[1]
        found = _json("GET", f"{self.issuer.rstrip('/')}/.well-known/openid-configuration")
        if found.get("issuer") != self.issuer:
            raise ProviderFailed(f"the provider calls itself {found.get('issuer')!r}")
        with self._lock:
            self._metadata = (time.monotonic(), found)
        return found


def is_safe(address: str) -> bool:
    """Whether secrets may be sent there: https, or this machine."""
    parts = urlsplit(address)
    if parts.scheme == "http":
        return parts.hostname in ("localhost", "127.0.0.1", "::1")
    return parts.scheme == "https" and bool(parts.hostname)


def _json(
    method: str,
    address: str,
    *,
    data: dict[str, str] | None = None,
    auth: tuple[str, str] | None = None,
) -> dict[str, Any]:
    """An answer of the provider, of bounded size and without redirects; ProviderFailed."""
    try:
        with httpx2.stream(
            method,
            address,
            data=data,
            auth=auth,
            timeout=TIMEOUT_S,
            follow_redirects=False,
            headers={"Accept": "application/json"},
        ) as answer:
            body = b""
            for chunk in answer.iter_bytes():
                body += chunk
                if len(body) > MAX_BYTES:
                    raise ProviderFailed("the provider's answer is too large")
            status = answer.status_code
    except httpx2.HTTPError as error:
        raise ProviderFailed("the provider cannot be reached") from error
    if status in (400, 401) and method == "POST":
        raise SignInFailed("The provider refused to finish the sign-in: begin again")
    if status != 200:
        raise ProviderFailed(f"the provider answered {status}")
    try:
        found = httpx2.Response(200, content=body).json()
    except ValueError as error:
        raise ProviderFailed("the provider's answer is no JSON") from error
    if not isinstance(found, dict):
        raise ProviderFailed("the provider's answer is no JSON object")
    return found


def _text(value: object) -> str:
    return value[:200] if isinstance(value, str) and value.isprintable() else ""
