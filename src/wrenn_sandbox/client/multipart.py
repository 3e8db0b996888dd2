"""The form of an upload around a file's bytes, so that the file itself is never held."""

import secrets
from dataclasses import dataclass
from typing import Self


@dataclass(frozen=True)
class Form:
    """`head`, the file's bytes, `tail`: the body of an upload whose path comes first."""

    head: bytes
    tail: bytes
    content_type: str

    @classmethod
    def of(cls, path: str, boundary: str | None = None) -> Self:
        """A form for the file at `path` of a sandbox."""
        mark = boundary or f"wrenn-{secrets.token_hex(16)}"
        head = (
            f'--{mark}\r\nContent-Disposition: form-data; name="path"\r\n\r\n{path}\r\n'
            f'--{mark}\r\nContent-Disposition: form-data; name="file"; filename="file"\r\n'
            "Content-Type: application/octet-stream\r\n\r\n"
        )
        return cls(
            head=head.encode("utf-8", "surrogateescape"),
            tail=f"\r\n--{mark}--\r\n".encode(),
            content_type=f"multipart/form-data; boundary={mark}",
        )

    def headers(self, size: int | None) -> dict[str, str]:
        """The request's headers; `size` is the file's in bytes where it is known."""
        headers = {"Content-Type": self.content_type}
        if size is not None:
            headers["Content-Length"] = str(len(self.head) + size + len(self.tail))
        return headers
