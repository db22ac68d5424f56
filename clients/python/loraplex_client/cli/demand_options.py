"""What ``loraplex load`` and ``loraplex plan`` both ask of a load."""

from dataclasses import dataclass
from typing import Annotated

import typer

from loraplex_client.plan import Demand, read_lengths, read_popularity

SloTtft = Annotated[float, typer.Option(help="Objective for the first token, seconds.")]


@dataclass(frozen=True, kw_only=True, slots=True)
class DemandOptions:
    """What requests look like."""

    popularity: Annotated[str, typer.Option(help="uniform, zipf[:S] or power[:ALPHA].")] = "zipf:1.0"
    base_share: Annotated[float, typer.Option(help="Share of requests without an adapter.")] = 0.0
    prompt: Annotated[str, typer.Option(help="Prompt tokens: N, or LOW:HIGH uniformly.")] = "8:512"
    output: Annotated[str, typer.Option(help="Output tokens: N, or LOW:HIGH uniformly.")] = "8:512"
    cv: Annotated[float, typer.Option(help="Burstiness of arrivals; 1 is Poisson.")] = 1.0

    def demand(self, *, num_adapters: int, rate: float, num_requests: int, seed: int) -> Demand:
        """Return what is asked of a deployment.

        Raises:
            ValueError: If no trace can be so.
        """
        kind, exponent = read_popularity(self.popularity)
        return Demand(
            num_adapters=num_adapters,
            rate=rate,
            cv=self.cv,
            popularity=kind,
            exponent=exponent,
            prompt=read_lengths(self.prompt, "--prompt"),
            output=read_lengths(self.output, "--output"),
            num_requests=num_requests,
            base_share=self.base_share,
            seed=seed,
        )
