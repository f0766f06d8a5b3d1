"""Tables of evidence: definitions in ``*.toml``, the runs they need, small rows, and their report.

`definition` reads what a table is, `rows` keeps what its report needs of each run, `running` runs
what is missing, `blocks` and `report` put it into words.
"""
