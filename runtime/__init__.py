"""Running a compiled program: transports, executor, optimizer, launching.

The virtual mesh drives every rank in one process, the process mesh one rank under torchrun;
nothing above a transport knows which it is. Imports `meshwright.compiler`'s data types.
"""

if __name__ == "runtime":
    raise ImportError(
        "`runtime` is a folder of meshwright's sources: import `meshwright.runtime`, "
        "or a second copy of every class would load"
    )
