"""The form of an upload around a file's bytes, so that the file itself is never held."""

import base64
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

from .errors import error_of_code
from .transport import given


@dataclass(frozen=True)
class Form:
    """`head`, the file's bytes, `tail`: the body of an upload whose fields come first."""

    head: bytes
    tail: bytes
    content_type: str

    @classmethod
    def of(cls, fields: Mapping[str, str], boundary: str | None = None) -> Self:
        """A form with `fields`, which name a file of a sandbox."""
        mark = boundary or f"wrenn-{secrets.token_hex(16)}"
        head = "".join(
            f'--{mark}\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{text}\r\n'
            for name, text in fields.items()
        )
        head += (
            f'--{mark}\r\nContent-Disposition: form-data; name="file"; filename="file"\r\n'
            "Content-Type: application/octet-stream\r\n\r\n"
        )
        return cls(
            head=head.encode(),
            tail=f"\r\n--{mark}--\r\n".encode(),
            content_type=f"multipart/form-data; boundary={mark}",
        )

    def headers(self, size: int | None) -> dict[str, str]:
        """The request's headers; `size` is the file's in bytes where it is known."""
        headers = {"Content-Type": self.content_type}
        if size is not None:
            headers["Content-Length"] = str(len(self.head) + size + len(self.tail))
        return headers


def naming(path: str | bytes) -> dict[str, str]:
    """The field that names a file; one that is no UTF-8 is named by its bytes."""
    try:
        raw = path.encode("utf-8", "surrogateescape") if isinstance(path, str) else path
        return {"path": raw.decode()}
    except UnicodeEncodeError as error:
        raise error_of_code("invalid_request", "path: is no text that a file can have") from error
    except UnicodeDecodeError:
        return {"raw_path": base64.b64encode(raw).decode()}


def upload_fields(path: str | bytes, user: str | None, mode: int | None) -> dict[str, str]:
    """The fields that say what is made where, for whom, and with which permission bits."""
    return naming(path) | given(user=user, mode=None if mode is None else f"{mode:04o}")
