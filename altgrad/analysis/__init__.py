"""Reads what a sweep recorded and says what it means; trains nothing and needs no Ray.

`report.write_report` is the way in: ledger (`records`) → cells and their comparisons (`cells`, `study`) → a
sentence (`finding`), pictures (`figures`) and the report around them. `test_matrix` lists what is tested in
what combination.
"""
