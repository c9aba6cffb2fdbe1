"""Compiles every kernel for devices that are not here, and checks what the compilers report."""
