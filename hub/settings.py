"""Environment of the hub: every field is `GRAFT_<NAME>` and a row in docs/settings.md."""

from pathlib import Path
from urllib.parse import urlsplit

from pydantic import Field, SecretStr, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

KiB, MiB, GiB = 2**10, 2**20, 2**30
MIN_KEY = 32


class Settings(BaseSettings):
    """Made once by the program that starts, passed to whoever needs it."""

    model_config = SettingsConfigDict(env_prefix="GRAFT_", frozen=True, extra="forbid")

    data_dir: Path = Field(
        Path("data"), description="folder of the catalogue, the blobs and the keys; one file system"
    )
    database_url: SecretStr | None = Field(
        None, description="`postgresql://…`; without it the catalogue is SQLite in the data folder"
    )
    host: str = Field("127.0.0.1", description="address to listen on")
    port: int = Field(8470, ge=0, le=65535, description="port to listen on; 0 takes a free one")
    public_url: str | None = Field(
        None,
        description="how people reach the hub; used in links, required when `host` is not loopback",
    )
    allowed_hosts: tuple[str, ...] = Field(
        (), description="further names this hub answers to, as a JSON list"
    )
    demo: bool = Field(True, description="fill an empty hub with the demo catalogue")
    secret_key: SecretStr | None = Field(
        None,
        description="signs sessions and upload links, 32 characters or more; without it `secret.key` is made",
    )
    signup: bool = Field(False, description="anybody may make an account on the page `/signup`")
    oidc_issuer: str | None = Field(
        None, description="address of an OpenID Connect provider that people may sign in with"
    )
    oidc_client_id: str | None = Field(None, description="this hub's name at that provider")
    oidc_client_secret: SecretStr | None = Field(
        None, description="and its secret there; without one only PKCE protects the exchange"
    )
    oidc_name: str = Field("single sign-on", description="what the button calls the provider")
    oidc_signup: bool = Field(
        False, description="whoever the provider signs in may make an account"
    )
    session_days: int = Field(30, gt=0, description="how long a login of the web page lasts")
    gitattributes: bool = Field(
        False,
        description="new repos start with a `.gitattributes`, as those on huggingface.co do",
    )
    max_regular_bytes: int = Field(
        64 * MiB, gt=0, description="larger files are asked for over Git LFS"
    )
    max_commit_bytes: int = Field(
        512 * MiB, gt=0, description="largest body of one commit with the files in it"
    )
    max_upload_bytes: int = Field(64 * GiB, gt=0, description="largest single file")
    lfs_part_bytes: int = Field(
        64 * MiB, gt=0, description="clients send larger Git LFS files in parts of this size"
    )
    max_body_bytes: int = Field(2 * MiB, gt=0, description="largest body of any other request")
    min_free_bytes: int = Field(
        256 * MiB, ge=0, description="uploads that would leave less free space are refused"
    )
    quota_bytes: int | None = Field(
        None,
        ge=0,
        description="what each user and organisation may keep unless `graft admin quota` says"
        " otherwise; without it there is no limit",
    )
    pending_bytes: int | None = Field(
        None,
        ge=0,
        description="what each user may have sent without a commit that refers to it, parts and"
        " chunks of Xet included; without it there is no limit but free space",
    )
    requests_per_token: int = Field(
        6000, ge=0, description="requests a minute with one token; 0: any number"
    )
    requests_per_address: int = Field(
        3000, ge=0, description="requests a minute from one address without one; 0: any number"
    )
    requests_at_once: int = Field(
        200, ge=0, description="requests of one token or address at the same time; 0: any number"
    )
    idle_s: int = Field(
        60, gt=0, description="a request ends when nothing more of its body comes for so long"
    )
    s3_bucket: str | None = Field(
        None,
        description="keep the blobs in this S3 bucket; credentials come from where boto3 looks,"
        " such as `AWS_ACCESS_KEY_ID`",
    )
    s3_prefix: str = Field("", description="only below this prefix of the bucket")
    s3_endpoint: str | None = Field(
        None, description="`https://…` of an S3 store other than AWS; else boto3's own settings"
    )
    s3_region: str | None = Field(
        None, description="region of the bucket; else boto3's own settings"
    )
    s3_public_endpoint: str | None = Field(
        None,
        description="address under which clients reach the S3 store; with it large files go"
        " between them and the store without passing through the hub",
    )
    s3_cache_bytes: int = Field(
        16 * GiB, ge=0, description="space for local copies of blobs that jobs read from S3"
    )
    workers: int = Field(1, ge=0, description="jobs that run at the same time; 0 runs none")
    job_memory_bytes: int = Field(
        8 * GiB, gt=0, description="memory one job's process may use before it is stopped"
    )
    gc_grace_days: int = Field(
        7, ge=1, description="blobs that nothing refers to are kept this long at least"
    )
    gc_condemned_hours: int = Field(
        24, ge=1, description="and this long after `graft admin gc` has condemned them"
    )
    gc_backup_days: int = Field(
        7, ge=0, description="`graft admin gc` refuses without a backup this young; 0 asks for none"
    )
    gc_every_hours: int = Field(
        0, ge=0, description="collect this often while the hub runs; 0 only by command"
    )
    webhook_private: bool = Field(
        False,
        description="webhooks may go to addresses that are not public, and without TLS",
    )
    mirror_url: str | None = Field(
        None,
        description="another hub, such as `https://huggingface.co`: users may load its repos by"
        " their names here, where they are kept",
    )
    mirror_token: SecretStr | None = Field(
        None, description="token for that hub; what it alone may read stays private here"
    )
    mirror_hours: float = Field(
        24, gt=0, description="mirrored repos are compared with that hub this often when used"
    )

    @field_validator("secret_key")
    @classmethod
    def _hard_to_guess(cls, key: SecretStr | None) -> SecretStr | None:
        """Whoever guesses it signs in as anybody."""
        if key is not None and len(key.get_secret_value()) < MIN_KEY:
            raise ValueError(f"at least {MIN_KEY} random characters are needed")
        return key

    @field_validator("public_url", "mirror_url")
    @classmethod
    def _an_address(cls, url: str | None) -> str | None:
        if url is None:
            return None
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"{url} is no address such as https://hub.example")
        return url
