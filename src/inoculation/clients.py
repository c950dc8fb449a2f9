"""The LLM clients of a stage: one a role, sharing the stage's budget and logging what they use."""

from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from inoculation.roles import Limits, Role
from inoculation.store import llm_cache

if TYPE_CHECKING:
    from inoculation.llm import Client, SetAside, Usage


class Clients:
    """The LLM clients of one stage, which share its budget."""

    def __init__(
        self, limits: Limits, log: "Callable[[str, str], Callable[[dict[str, float], list[dict[str, Any]]], None]]"
    ) -> None:
        """Args:
        limits: how calls are made.
        log: (role, model) -> what logs that role's usage so far.
        """
        self.limits, self.log, self.made = limits, log, list["Client"]()

    def get(self, name: str, role: Role) -> "Client | None":
        """The client of a role; None where the role is played without an LLM.

        Raises:
            InputError: a key or a price is missing; nothing was sent.
        """
        return self.require(name, role) if role.method == "llm" else None

    def require(self, name: str, role: Role) -> "Client":
        """The client of a role's model, whatever its method.

        Raises:
            InputError: a model, a key or a price is missing; nothing was sent.
        """
        from inoculation.llm import Client

        def record(usage: "Usage", aside: "list[SetAside]") -> None:
            print(f"{name} ({role.model}): {usage}")
            log(asdict(usage), [row._asdict() for row in aside])

        def elsewhere() -> float:
            return sum(other.committed for other in self.made if other is not client)

        client = Client(name, role, self.limits, llm_cache(), record, elsewhere)
        log = self.log(name, client.model)
        self.made.append(client)
        return client
