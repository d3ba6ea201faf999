"""The plan language: text to typed statements and back.

Grammar, parser, statements with their spans, canonical formatter, Python builder, and the
errors that every later stage raises. Imports nothing else of Meshwright and nothing of torch.
"""

if __name__ == "dsl":
    raise ImportError(
        "`dsl` is a folder of meshwright's sources: import `meshwright.dsl`, "
        "or a second copy of every class would load"
    )
