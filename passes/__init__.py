"""One parallel technique per file, each a rewrite of a whole program.

Each file's docstring shows the graph before and after; `driver.py` is the list in order.
Imports `meshwright.compiler` and `meshwright.dsl`.
"""

if __name__ == "passes":
    raise ImportError(
        "`passes` is a folder of meshwright's sources: import `meshwright.passes`, "
        "or a second copy of every class would load"
    )
