"""What the commands do. Each takes its arguments and returns an exit code."""

from __future__ import annotations

import json
import sys
import tempfile
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import torch

from meshwright.compiler.graph.data import graph_data
from meshwright.compiler.graph.ir import Graph
from meshwright.compiler.graph.text import size_text, spelt
from meshwright.compiler.public import Program
from meshwright.compiler.report.cost.cost import Cost
from meshwright.compiler.report.cost.step import StepTime
from meshwright.compiler.report.listing import graph_text
from meshwright.compiler.report.memory.holding import moments_sheet, places_sheet
from meshwright.compiler.report.show import show_text
from meshwright.compiler.report.tables import sheet_text
from meshwright.compiler.report.timeline import timeline_data
from meshwright.dsl.errors import did_you_mean, plural
from meshwright.dsl.plan import Plan
from meshwright.launcher.job import Job
from meshwright.launcher.launch import launch as launch_processes
from meshwright.models import CommandError, UsageError, load_model, load_optimizer
from meshwright.passes import driver
from meshwright.runtime.machine import RUNTIME


def check(arguments: Namespace) -> int:
    """Read the plan and, with a model, compile it."""
    plan = Plan.load(arguments.plan)
    program = compiled(arguments, plan) if arguments.model else None
    if arguments.json:
        print_json(_checked(plan, program))
        return 0
    mesh = ", ".join(f"{axis}={size}" for axis, size in plan.mesh)
    where = f"mesh {mesh}" if mesh else "no mesh"
    print_text(f"{plan.source.name}: {plural(len(plan.statements), 'statement')}, {where}")
    if program is not None:
        comm, peak = program.comm(), size_text(program.memory().peak)
        moved = f"{plural(len(comm), 'collective')}, {size_text(comm.total_bytes())} sent"
        name = type(program.model).__name__
        print_text(f"{name}: compiles; {moved} per rank per step, peak memory {peak} per rank")
    return 0


def _checked(plan: Plan, program: Program | None) -> dict[str, object]:
    found: dict[str, object] = {
        "plan": plan.source.name,
        "statements": len(plan.statements),
        "mesh": dict(plan.mesh),
    }
    if program is not None:
        found["model"] = type(program.model).__name__
        found["counts"] = program.comm().counts()
        found["bytes_by_axis"] = program.comm().bytes_by_axis()
        found["memory"] = program.memory().figures()
    return found


def show(arguments: Namespace) -> int:
    """Print a compiled program's tables."""
    program = compiled(arguments)
    if arguments.json:
        print_json(program.to_json())
    elif sys.stdout.isatty():
        program.show(local=arguments.local)
    else:
        print_text(show_text(program, local=arguments.local))
    return 0


def graph(arguments: Namespace) -> int:
    """Print graphs, equal layers once, or those of their nodes that belong to one module."""
    program = compiled(arguments)
    graphs = _chosen(program, arguments.name)
    if arguments.module:
        graphs = [_part(each, arguments.module, program) for each in graphs]
    if arguments.json:
        print_json({each.name: graph_data(each, local=arguments.local) for each in graphs})
    else:
        options = {"local": arguments.local, "full": arguments.full or bool(arguments.module)}
        print_text("\n\n".join(graph_text(each, **options) for each in graphs))
    return 0


def _chosen(program: Program, name: str | None) -> list[Graph]:
    graphs = program.graphs()
    if name is None:
        return list(graphs.values())
    if name not in graphs:
        raise CommandError(f"no graph is called `{name}`", help=did_you_mean(name, graphs))
    return [graphs[name]]


def _part(graph: Graph, module: str, program: Program) -> Graph:
    known = [name for name, _ in program.model.named_modules() if name]
    if module not in known:
        raise CommandError(f"the model has no module `{module}`", help=did_you_mean(module, known))
    nodes = tuple(
        node for node in graph.nodes if any(path == module for path, _ in node.origin.modules)
    )
    return replace(graph, nodes=nodes, outputs=())


def timeline(arguments: Namespace) -> int:
    """Print what each rank does in a step, in order."""
    program = compiled(arguments)
    if arguments.json:
        print_json(timeline_data(program))
    else:
        print_text(program.timeline())
    return 0


def memory(arguments: Namespace) -> int:
    """Print what ranks hold and need, and when."""
    kind, options = load_optimizer(arguments.optimizer)
    found = compiled(arguments).memories(kind, **options)
    if arguments.json:
        print_json({place: each.to_json() for place, each in found.items()})
        return 0
    place = arguments.place or max(found, key=lambda each: found[each].peak)
    if place not in found:
        known = (
            did_you_mean(place, found) if len(found) > 1 else "leave out `--place`: all are alike"
        )
        raise CommandError(f"no rank is at `{place}`", help=known)
    texts = [sheet_text(moments_sheet(found[place]))] if arguments.timeline else [str(found[place])]
    if len(found) > 1:
        texts = [sheet_text(places_sheet(found, "")), f"at {place}\n{texts[0]}"]
    print_text("\n\n".join(texts))
    return 0


def cost(arguments: Namespace) -> int:
    """Print what a step costs: formulas or, on a cluster, its time."""
    names, cluster = arguments.names, arguments.cluster
    if names and cluster:
        raise UsageError(
            "`--names` and `--cluster` exclude each other",
            help="write `--names` for formulas, or `--cluster` for the time of a step",
        )
    program = compiled(arguments)
    found: Cost | StepTime = (
        program.cost(cluster, convention=arguments.convention)
        if cluster
        else program.cost(names=names, convention=arguments.convention)
    )
    if arguments.json:
        print_json(found.to_json())
    else:
        print_text(str(found))
    return 0


def calibrate(arguments: Namespace) -> int:
    """Measure this machine in two processes, and print or write its description."""
    path = Path(arguments.file) if arguments.file else None
    if path is not None and path.suffix != ".toml":
        raise UsageError(f"`{path}` is not a TOML file", help=f"write `{path}.toml`")
    if path is not None and path.exists():
        raise CommandError(f"there is a file `{path}` already", help="name a new file")
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder) / "cluster.toml"
        job = Job(("-m", "meshwright.calibrate", device, str(found)), 2)
        if code := launch_processes(job):
            return code
        text = found.read_text(encoding="utf-8")
    if path is not None:
        _write(path, text)
        text = f"{path}: written\n"
    print_text(text.rstrip("\n"))
    return 0


def schedule(arguments: Namespace) -> int:
    """Print what each rank of a pipeline runs and sends, and when."""
    found = compiled(arguments).schedule(
        simulate=arguments.simulate,
        schedule=arguments.schedule,
        ranks=arguments.ranks,
        virtual=arguments.virtual,
        microbatches=arguments.microbatches,
        cluster=arguments.cluster,
    )
    if arguments.json:
        print_json(found.to_json())
    elif sys.stdout.isatty():
        found.print()
    else:
        print_text(found.text())
    return 0


def explain(arguments: Namespace) -> int:
    """Print the explanation of one module, parameter or input."""
    explanation = compiled(arguments).explain(arguments.name)
    if arguments.json:
        print_json(explanation.to_json())
    else:
        print_text(str(explanation))
    return 0


def fmt(arguments: Namespace) -> int:
    """Print, check or write the canonical form of plans."""
    plans = {path: Plan.load(path) for path in arguments.plans}
    formatted = {path: plan.format() for path, plan in plans.items()}
    changed = [path for path in plans if formatted[path] != plans[path].source.text]
    if arguments.write:
        for path in changed:
            _write(Path(path), formatted[path])
    if arguments.json:
        print_json(
            [
                {"plan": path, "changed": path in changed, "text": text}
                for path, text in formatted.items()
            ]
        )
    elif arguments.check or arguments.write:
        for path in changed:
            print_text(f"{path}: {'written' if arguments.write else 'not in canonical form'}")
    else:
        # A plan is UTF-8 text, whatever the encoding of the terminal.
        sys.stdout.flush()
        sys.stdout.buffer.write("\n".join(formatted.values()).encode("utf-8"))
    return 1 if arguments.check and changed else 0


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise CommandError(
            f"cannot write `{path}`: {error.strerror}", help="check the path and its folder"
        ) from None


def run(arguments: Namespace) -> int:
    """Run a script in one process per rank, and return its exit code."""
    return launch_processes(arguments.job)


def demo(arguments: Namespace) -> int:
    """Run `meshwright.demo`, in this process or in one process per rank."""
    from meshwright import demo as demonstration

    steps = arguments.steps or demonstration.STEPS
    if arguments.processes:
        options = ["--json"] if arguments.json else []
        words = ("-m", "meshwright", "demo", f"--steps={steps}", *options)
        return launch_processes(Job(words, int(arguments.processes)))
    return demonstration.run(steps, as_json=arguments.json)


def compiled(arguments: Namespace, plan: Plan | None = None) -> Program:
    """The program of the model and the plan on the command line."""
    plan = plan or Plan.load(arguments.plan)
    model, example = load_model(arguments.model)
    options = {"mode": arguments.mode, "device": arguments.device}
    return driver.compile_program(model, plan, example, runtime=RUNTIME, **options)


def print_text(text: str) -> None:
    """Print text in the letters that the output can spell."""
    print(spelt(text, sys.stdout.encoding))


def print_json(data: object) -> None:
    """Print JSON, escaped only where the output cannot spell it."""
    text = json.dumps(data, indent=2, ensure_ascii=False)
    spells = spelt(text, sys.stdout.encoding) == text
    print(text if spells else json.dumps(data, indent=2))
