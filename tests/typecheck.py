"""The checker of annotations that every call into rodjax goes through in the tests."""

from beartype import BeartypeConf, beartype

# A whole number will do where a float is asked for, as for type checkers.
check = beartype(conf=BeartypeConf(is_pep484_tower=True))
