"""From a model and a plan's facts to per-rank code.

Capture, the graph, layouts and the rules that move them through operators, collectives and
their adjoints, differentiation, cost, and code generation. Imports only `meshwright.dsl`.
"""

if __name__ == "compiler":
    raise ImportError(
        "`compiler` is a folder of meshwright's sources: import `meshwright.compiler`, "
        "or a second copy of every class would load"
    )
