"""`meshwright run`: a script in one process per rank, seen to its end.

`launch.py` is the story. `rank.py` is what a rank runs before its script, `warden.py` ends the
ranks of a launcher that was killed, `output.py` is where their words go, `store.py` where they
meet, `signals.py` what this process is told, and `verdict.py` the paragraph at the end.
"""
