"""What `kernels:` asks of each site: its op's key, and over it the globs of `sites`."""

from __future__ import annotations

from fasttrain.config.errors import Problem, UserError
from fasttrain.config.kernel_rules import backends_of
from fasttrain.config.schema.kernels import KernelsConfig
from fasttrain.core.kernel_plan import fits

AUTO = "auto"


class SiteRules:
    """The globs of a config, and which of them have fitted something."""

    def __init__(self, config: KernelsConfig) -> None:
        self.config = config
        self._fitted: set[tuple[str, str]] = set()

    def asked(self, op: str, path: str) -> tuple[str, str]:
        """The backend that is asked for at a site, and who asks: "the config", or a key of it.

        UserError where two globs ask for different ones.
        """
        found = {
            pattern: backend
            for pattern, backends in self.config.sites.items()
            if (backend := _of(op, backends)) is not None and fits(path, pattern)
        }
        self._fitted |= {(op, pattern) for pattern in found}
        if len(set(found.values())) > 1:
            listed = " and ".join(f"'{pattern}: {backend}'" for pattern, backend in found.items())
            raise UserError(
                Problem(
                    key="kernels.sites",
                    what=f"{listed} both fit {path}, for {op}.",
                    hint="Make one of them narrower, or the two alike.",
                )
            )
        if not found:
            return getattr(self.config, op), "the config"
        pattern, backend = next(iter(found.items()))
        return backend, f"kernels.sites '{pattern}'"

    def refuse_unfitted(self) -> None:
        """UserError where a glob fits no site of an op that it names, or no site at all."""
        for pattern, backends in self.config.sites.items():
            fitted = {op for op, glob in self._fitted if glob == pattern}
            missed = set(backends) - fitted if isinstance(backends, dict) else set()
            if not fitted or missed:
                sites = "site" if not missed else f"site of {', '.join(sorted(missed))}"
                raise UserError(
                    Problem(
                        key="kernels.sites",
                        what=f"'{pattern}' fits no {sites} in this model.",
                        hint="`fasttrain kernels explain FILE --sites` lists their names.",
                    )
                )


def _of(op: str, backends: str | dict[str, str]) -> str | None:
    """What a glob asks of an op; a backend alone is asked of every op that has it."""
    if isinstance(backends, dict):
        return backends.get(op)
    return backends if backends in backends_of(op) else None
