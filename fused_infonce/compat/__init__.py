"""Drop-ins: one module per library, with its classes' names, arguments, defaults and values. None is imported here, and
no library is imported unless its module is."""
