"""Drop-ins: one module per library, with the names, arguments, defaults and values of that library's classes.

No drop-in is imported here, and no library unless its drop-in is.
"""
