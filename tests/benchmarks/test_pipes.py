"""The model of a processor's pipes counts what a disassembly says."""

from __future__ import annotations

from benchmarks.tiles import pipes

CODE = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_0:
        /*0010*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4], R24, !UPT ;
        /*0020*/              @!P0 IMAD.WIDE R2, R3, 0x4, R4 ;
        /*0030*/               @P1 BRA `(.L_x_0) ;
        /*0040*/                   MUFU.EX2 R5, R5 ;
        /*0050*/                   FFMA R6, R5, R7, R8 ;
        /*0060*/                   SHFL.BFLY PT, R9, R6, 0x1, 0x1f ;
        /*0070*/                   EXIT ;
"""


def test_the_parts_of_a_kernel_are_counted():
    found = dict(pipes.parts(CODE, warps=8))
    none = dict.fromkeys(("issue", "alu", "fma", "exponentials", "shared", "tensor"), 0)
    assert found["before"] == none | {"issue": 2, "alu": 4}
    assert found["loop"] == none | {"issue": 6, "fma": 4, "tensor": 128}
    assert found["after"] == none | {"issue": 8, "fma": 2, "exponentials": 16, "shared": 4}


def test_code_without_a_loop_is_all_after_it():
    found = dict(pipes.parts("/*0000*/ FADD R0, R1, R2 ;\n", warps=4))
    assert (found["loop"]["issue"], found["after"]["fma"]) == (0, 1)
