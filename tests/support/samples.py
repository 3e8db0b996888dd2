"""What `/metrics` says, as numbers."""

from collections.abc import Iterator

import httpx2
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families


class Samples:
    """All numbers of one answer."""

    def __init__(self, text: str) -> None:
        self.families = list(_families(text))

    @classmethod
    async def of(cls, client: httpx2.AsyncClient) -> "Samples":
        answer = await client.get("/metrics")
        assert answer.status_code == 200, answer.text
        return cls(answer.text)

    def value(self, name: str, **labels: str) -> float | None:
        """The sample with exactly these labels, save for empty ones; None where there is none."""
        for family in self.families:
            for sample in family.samples:
                known = {key: value for key, value in sample.labels.items() if value}
                if sample.name == name and known == labels:
                    return sample.value
        return None

    def labels(self, name: str) -> list[dict[str, str]]:
        """Of each sample of this name."""
        return [
            sample.labels
            for family in self.families
            for sample in family.samples
            if sample.name == name
        ]

    def series(self) -> set[tuple[str, frozenset[tuple[str, str]]]]:
        """Names with labels, of all samples."""
        return {
            (sample.name, frozenset(sample.labels.items()))
            for family in self.families
            for sample in family.samples
        }

    @property
    def types(self) -> dict[str, str]:
        """The type of each metric, by the name that queries use."""
        return {
            family.name + ("_total" if family.type == "counter" else ""): family.type
            for family in self.families
        }


def _families(text: str) -> Iterator[Metric]:
    """Without the times at which counters were made, which nobody asks for."""
    for family in text_string_to_metric_families(text):
        if not family.name.endswith("_created"):
            yield family
