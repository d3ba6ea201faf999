"""`meshwright run`: a script in one process per rank, until the last one has ended.

`launch.py` is the story. `rank.py` is what a rank runs before its script, `warden.py` ends the
ranks of a launcher that was killed, `output.py` handles what ranks print, `store.py` is where they
meet, `signals.py` records signals to the launcher, and `verdict.py` is the paragraph at the end.
"""
