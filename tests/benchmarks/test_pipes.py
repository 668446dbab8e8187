"""The model of a processor's pipes counts what a disassembly says."""

from __future__ import annotations

import pytest

pytest.importorskip("triton", reason="triton is not installed")

from benchmarks.tiles import pipes

NONE = dict.fromkeys(pipes.PIPES, 0)
ONE_TILE = pipes.Shape("sm_90", "coefficients_kernel", 64, 128, 128)  # two warp groups, 64 rows each

# a program of one tile: two of four instructions of the product in a loop that runs twice, then what is out of the way
CODE = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
        /*0008*/               @P0 EXIT ;
.L_x_0:
        /*0010*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4], R24, !UPT ;
        /*0018*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4], R24, gsb0 ;
        /*0020*/              @!P0 IMAD.WIDE R2, R3, 0x4, R4 ;
        /*0028*/              @!P1 BRA `(.L_x_2) ;
.L_x_1:
        /*0030*/               @P1 BRA `(.L_x_0) ;
        /*0040*/                   MUFU.EX2 R5, R5 ;
        /*0050*/                   FFMA R6, R5, R7, R8 ;
        /*0060*/                   SHFL.BFLY PT, R9, R6, 0x1, 0x1f ;
        /*0070*/                   EXIT ;
.L_x_2:
        /*0080*/                   FADD R6, R5, R7 ;
        /*0090*/                   BRA `(.L_x_1) ;
"""
# programs of many tiles, each of a step before a loop of one more
NESTED = """
        /*0000*/                   FADD R6, R5, R7 ;
.L_x_0:
        /*0010*/                   UTCHMMA gdesc[UR4], gdesc[UR6], tmem[UR8], tmem[UR10], idesc[UR11], !UPT ;
.L_x_1:
        /*0020*/               @P2 UTCHMMA gdesc[UR4], gdesc[UR6], tmem[UR8], tmem[UR10], idesc[UR11], UPT ;
        /*0030*/                   BRA.U !UP0, `(.L_x_1) ;
        /*0040*/                   MUFU.EX2 R5, R5 ;
        /*0050*/              @!P0 BRA `(.L_x_0) ;
        /*0060*/                   EXIT ;
"""


def parts(shape, code, warps=8):
    return {part.pop("part"): part for part in map(dict, pipes.parts(shape, code, warps))}


def test_a_tile_is_its_steps_and_what_surrounds_them():
    found = parts(ONE_TILE, CODE)
    assert found["step"] == NONE | {"times": 2, "issue": 10, "fma": 4, "tensor": 256}
    assert found["before"] == NONE | {"times": 1, "issue": 4, "alu": 4}
    assert found["tile"] == NONE | {"times": 1, "issue": 8, "fma": 2, "exponentials": 16, "shared": 4}
    assert list(found) == ["before", "tile", "step"]


def test_a_step_before_the_loop_counts_too():
    found = parts(pipes.Shape("sm_100", "statistics_kernel", 64, 128, 64), NESTED)
    assert found["program"] == NONE | {"times": 0, "issue": 4, "fma": 2}
    assert found["tile"] == NONE | {"times": 1, "issue": 6, "exponentials": 16, "tensor": 32}
    assert found["step"] == NONE | {"times": 3, "issue": 4, "tensor": 32}


def test_products_that_do_not_add_up_to_a_tile_are_no_count():
    with pytest.raises(ValueError, match="the matrix work of a tile is"):
        list(pipes.parts(ONE_TILE._replace(d=80), CODE, 8))
    with pytest.raises(ValueError, match="found 0 and 0 a step"):
        list(pipes.parts(ONE_TILE, "/*0000*/ FADD R0, R1, R2 ;\n", 4))


def test_two_products_a_tile_of_which_one_is_made_twice():
    code = "/*0000*/ HGMMA.64x64x16.F32 ;\n" * 4 + "/*0000*/ HGMMA.64x32x16.F32 ;\n" * 4
    code = f".L_x_0:\n{code}/*0000*/ BRA `(.L_x_0) ;\n/*0000*/ EXIT ;\n"
    found = parts(pipes.Shape("sm_90", "gradient_kernel", 64, 64, 64), code)
    assert found["tile"]["tensor"] == 2 * 4 * 64 * 96 * 16 * 2 // 4096


@pytest.mark.parametrize(
    ("registers", "warps", "shared", "columns", "fit"),
    [(128, 8, 98304, 0, 2), (129, 8, 98304, 0, 1), (64, 8, 229376, 0, 1), (32, 4, 0, 128, 4), (255, 4, 0, 0, 2)],
)
def test_programs_of_a_processor(registers, warps, shared, columns, fit):
    assert pipes.programs(registers, warps, shared, columns) == fit
