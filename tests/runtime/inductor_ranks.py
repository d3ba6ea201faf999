"""One rank of a mesh of two: under Inductor it computes what it computes operator by operator."""

from __future__ import annotations

from tests.compiler.codegen.test_segments import TENSOR, X, compiled, difference

found = []
for backend in ("eager", "inductor"):
    with compiled(TENSOR).launch(backend=backend, seed=3) as run:
        found.append({"loss": run.step(X), **run.gradients()})
print("same" if difference(found[0], found[1]) < 1e-10 else "different")
