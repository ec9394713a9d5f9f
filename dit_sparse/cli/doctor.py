# SPDX-License-Identifier: Apache-2.0
"""``dit-sparse doctor``: what would run on this machine, and why each other kernel would not."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text

from dit_sparse.cli.console import ERR, OUT, Debug, styled

if TYPE_CHECKING:
    from dit_sparse.forecast.doctor import Device, Diagnosis, Kernel

EXAMPLES = (
    "dit-sparse doctor",
    "dit-sparse doctor --build",
    "dit-sparse doctor --json > machine.json",
)


def run(
    build: Annotated[
        bool, typer.Option("--build", help="Build the native CPU kernel before checking.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print all results as JSON, e.g. for a bug report.")
    ] = False,
    debug: Debug = False,  # noqa: ARG001  (read by ``guarded``)
) -> None:
    """Say what would run on this machine; exit code 1 where something is wrong.

    Each kernel that can run is checked against the reference on a small problem.
    """
    if build:
        _build()
    with ERR.status("checking kernels"):
        from dit_sparse.forecast.doctor import diagnose

        found = diagnose()
    if as_json:
        typer.echo(json.dumps(found.as_dict(), indent=2, allow_nan=False))
    else:
        _show(found)
    raise typer.Exit(1 if found.problems else 0)


def _build() -> None:
    from dit_sparse.errors import NativeUnavailable
    from dit_sparse.kernels import native_build

    with ERR.status("building the native CPU kernel"):
        try:
            native_build.build()
        except native_build.BuildError as error:
            raise NativeUnavailable(
                f"the native CPU kernel cannot be built: {error}\n{native_build.HOW}"
            ) from error


def _show(found: Diagnosis) -> None:
    from dit_sparse.pipelines import ALL

    env = found.environment
    about = f", Python {env['python']}, {env['platform']}"
    OUT.print(styled((f"dit_sparse {env['dit_sparse']}", "bold"), about))
    known = (
        styled(f"{name} ", version or ("not installed", "dim"))
        for name, version in env["packages"].items()
    )
    OUT.print(Text(", ").join(known))
    OUT.print(f"{env['cores']} CPU cores, torch uses {env['torch_threads']} threads\n")
    for device in found.devices:
        OUT.print(
            styled(
                (device.name, "bold"),
                f" ({device.description}), {device.dtype}: default kernel ",
                (device.chosen, "bold") if device.chosen else ("none available", "red"),
            )
        )
        table = Table(box=None, padding=(0, 2, 0, 2), show_header=False)
        for kernel in device.kernels:
            table.add_row(kernel.name, _state(kernel, device))
        OUT.print(table)
        OUT.print()
    native = found.native
    loaded = f"{native.library} ({', '.join(native.instruction_sets) or 'no instruction set'})"
    OUT.print(styled(("native", "bold"), f"      {native.reason or loaded}"))
    OUT.print(styled(("models", "bold"), f"      {ALL}"))
    OUT.print(styled(("strategies", "bold"), f"  {', '.join(found.strategies) or 'none'}"))
    for problem in found.problems:
        OUT.print(styled(("problem:", "bold red"), f" {problem}"))
    OUT.print(
        "No problems found." if not found.problems else f"Problems found: {len(found.problems)}."
    )


def _state(kernel: Kernel, device: Device) -> Text:
    if kernel.reasons:
        return styled(("no:", "dim"), f" {'; '.join(kernel.reasons)}")
    if kernel.check is not None:
        return styled(("wrong:", "red"), f" {kernel.check}")
    if kernel.by_name_only:
        return Text("available; opt-in, never selected by default")
    first = "default" if kernel.name == device.chosen else "available"
    return styled((first, "green"), "; agrees with the reference")
