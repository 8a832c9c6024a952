"""Golden vectors: inputs and outputs, stored as bytes, to check any implementation.

v1/          the vectors, one file per operation        schema/   what a file may hold
operations   the table: names, arguments, outputs       cases/    one file per method
generate     writes v1/ from cases/ and the reference; schema/, manifest.json and the
             README's list of functions from the table
ways         names for other accepted answers
drivers/     the columns and the peers as plain functions
runner       runs an implementation over the vectors    report    reports the results
"""
