"""The drivers that a host can have."""

from typing import get_args

from wrenn_sandbox.host.backends import BACKENDS
from wrenn_sandbox.settings import HostSettings


def test_the_setting_takes_the_name_of_each_driver() -> None:
    assert set(get_args(HostSettings.model_fields["driver"].annotation)) == {"auto", *BACKENDS}
