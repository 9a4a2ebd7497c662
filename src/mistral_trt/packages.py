"""What the installed distribution asks for, extra by extra → what of it is installed, missing or too old."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

DISTRIBUTION = "mistral-trt"

_REQUIREMENT = re.compile(r"([\w.-]+)\s*(?:\[([^\]]*)\])?\s*([^;]*?)\s*(?:;.*)?")
_EXTRA = re.compile(r"""extra\s*==\s*['"]([\w.-]+)['"]""")


@dataclass(frozen=True)
class Package:
    """One distribution that this package asks for.

    extra: the first that asks for it, "" for the package itself.  needs: its range, as ">=2.13".  installed:
    its version, None if it is not there.
    """

    name: str
    extra: str
    needs: str
    installed: str | None

    @property
    def state(self) -> str:
        """ok, missing or too old."""
        if self.installed is None:
            return "missing"
        bounds = [bound[2:].strip() for bound in self.needs.split(",") if bound.startswith(">=")]
        return "too old" if any(release(self.installed) < release(bound) for bound in bounds) else "ok"


def wanted_packages(extras: Iterable[str]) -> list[Package]:
    """Every package of the distribution itself and of these extras, each under the first that asks for it.

    Raises PackageNotFoundError (importlib.metadata) if the distribution is not installed.
    """
    from importlib import metadata

    requirements = metadata.requires(DISTRIBUTION) or []
    found: dict[str, Package] = {}
    for extra in ["", *extras]:
        for name, needs in _requirements(requirements, extra):
            found.setdefault(name, Package(name, extra, needs, installed_version(name)))
    return list(found.values())


def installed_version(name: str) -> str | None:
    """Version of a distribution, None if it is not installed or has lost its metadata."""
    from importlib import metadata  # here: slow to import, and only engines ask

    try:
        version: str | None = metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
    return version


def release(version: str) -> tuple[int, ...]:
    """2.13.0+cpu → (2, 13), to compare: neither zeros at the end count nor what follows the numbers."""
    match = re.match(r"\d+(\.\d+)*", version)
    numbers = [int(number) for number in match[0].split(".")] if match else []
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)


def _requirements(requirements: list[str], extra: str) -> list[tuple[str, str]]:
    """Name and range of what an extra asks for; the extras it is made of are taken apart."""
    found = []
    for requirement in requirements:
        match = _REQUIREMENT.fullmatch(requirement.strip())
        marker = _EXTRA.search(requirement)
        if match is None or (marker[1] if marker else "") != extra:
            continue
        name, inner, needs = match[1], match[2] or "", match[3]
        if name != DISTRIBUTION:
            found.append((name, needs))
            continue
        for part in inner.split(","):
            found += _requirements(requirements, part.strip())
    return found
