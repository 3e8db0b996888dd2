"""What an image may be called."""

import pytest

from wrenn_sandbox.errors import InvalidRequest
from wrenn_sandbox.host.builds.reference import parse


@pytest.mark.parametrize(
    ("text", "meaning"),
    [
        ("debian", "docker://debian"),
        ("debian:12", "docker://debian:12"),
        ("registry.test:5000/team/app:1.0", "docker://registry.test:5000/team/app:1.0"),
        ("docker://debian:12", "docker://debian:12"),
        ("app@sha256:" + "0" * 64, "docker://app@sha256:" + "0" * 64),
        ("oci:layout:tag", "oci:layout:tag"),
        ("oci-archive:/tmp/a.tar", "oci-archive:/tmp/a.tar"),
        ("docker-archive:saved.tar", "docker-archive:saved.tar"),
        ("dir:/tmp/image", "dir:/tmp/image"),
    ],
)
def test_an_image_is_named_as_in_a_registry_or_by_its_kind(text: str, meaning: str) -> None:
    assert parse(text).text == meaning


def test_only_images_of_registries_are_remote() -> None:
    assert parse("debian").remote
    assert not parse("oci:debian").remote


@pytest.mark.parametrize(
    "text", ["", " ", "--help", "a b", "a\nb", "a\0b", "http://x/y$", "A" * 2000]
)
def test_what_cannot_name_an_image_is_refused(text: str) -> None:
    with pytest.raises(InvalidRequest):
        parse(text)


def test_stores_of_other_programs_are_refused_with_a_way_out() -> None:
    with pytest.raises(InvalidRequest, match="save the image to a file"):
        parse("docker-daemon:debian:12")
