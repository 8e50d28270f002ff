"""Counting instructions in machine code, on listings whose numbers are known by hand."""

import machine_code
import pytest

# Two nested loops. Out of the inner one, waiting for a barrier: .L_x_9, at the end. In the outer
# one a way around two instructions (.L_x_4), taken by most passes, and a subroutine.
NESTED = """
_kernel:
.text._kernel:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
.L_x_1:
        /*0010*/                   FADD R1, R2, R3 ;
        /*0020*/                   FADD R1, R2, R3 ;
        /*0030*/              @!P1 BRA `(.L_x_3) ;
.L_x_2:
        /*0040*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P2, [UR4], R5 ;
        /*0050*/              @!P2 BRA `(.L_x_9) ;
.L_x_8:
        /*0060*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR20], R24 ;
        /*0070*/               @P0 CALL.REL.NOINC `(.L_x_3) ;
        /*0080*/                   BRA `(.L_x_2) ;
.L_x_3:
        /*0090*/                   FMUL R1, R2, R3 ;
        /*00a0*/                   BRA.U UP0, `(.L_x_4) ;
        /*00b0*/                   FSEL R1, R2, R3, P0 ;
        /*00c0*/                   FSEL R1, R2, R3, P0 ;
.L_x_4:
        /*00d0*/                   CALL.REL.NOINC `($_kernel$__cuda_sm3x_div) ;
        /*00e0*/               @P4 BRA `(.L_x_1) ;
        /*00f0*/              @!P0 EXIT ;
        /*0100*/                   STG.E.128 desc[UR4][R2.64], R4 ;
        /*0110*/                   EXIT ;
.L_x_9:
        /*0120*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P2, [UR4], R5 ;
        /*0130*/              @!P2 BRA `(.L_x_9) ;
        /*0140*/                   BRA `(.L_x_8) ;
        .type           $_kernel$__cuda_sm3x_div,@function
$_kernel$__cuda_sm3x_div:
        /*0150*/                   MUFU.RCP R1, R2 ;
        /*0160*/                   RET.REL.NODEC R4 `(_kernel) ;
.L_x_10:
        /*0170*/                   BRA `(.L_x_10);
        /*0180*/                   NOP;
"""

# No loop: lanes that are off jump over the store, a tail that is seldom run is jumped over by all.
STRAIGHT = """
kernel:
\ts_load_dwordx2 s[2:3], s[0:1], 0x0
\tglobal_load_dwordx4 v[0:3], v4, s[2:3]
\ts_cbranch_scc1 .LBB0_2
\tv_add_f32 v1, v2, v3
.LBB0_2:                                ; %tail
\ts_and_saveexec_b64 s[0:1], vcc
\ts_cbranch_execz .LBB0_3
\tglobal_store_dword v0, v1, s[2:3]
.LBB0_3:
\ts_endpgm
"""


def test_a_pass_through_the_loop_around_the_products():
    """.L_x_1 to .L_x_3: 3, of the inner loop none, then 2, past the two FSEL, and 2."""
    code = machine_code.blocks(NESTED)
    assert machine_code.main_loop(code) == 3 + 2 + 2
    assert sum(len(block.opcodes) for block in code) == 24
    assert machine_code.counts(code) == {"HGMMA": 1, "STG": 1, "STG.128": 1}


def test_a_kernel_around_the_products():
    """Without the outer loop: 1 before it, then the same, `@!P0 EXIT` and two more."""
    code = machine_code.blocks(NESTED.replace("@P4 BRA `(.L_x_1)", "    FADD R1, R2, R3"))
    assert machine_code.main_loop(code) == 1 + 3 + 2 + 2 + 1 + 2


def test_the_longest_innermost_loop_that_loads():
    """Without products the outer loop is of no interest: the inner one is 5 instructions long."""
    text = NESTED.replace("HGMMA.64x128x16.F32.BF16 R24, gdesc[UR20], R24", "LDG.E.128 R4, [R2]")
    assert machine_code.main_loop(machine_code.blocks(text)) == 5


def test_a_kernel_without_a_loop_from_its_beginning_to_its_end():
    code = machine_code.blocks(STRAIGHT)
    assert machine_code.main_loop(code) == 3 + 2 + 1 + 1
    assert machine_code.counts(code) == {"load": 1, "load.128": 1, "store": 1}


def test_a_table_of_targets_is_followed():
    """A warp-specialised kernel dispatches its parts by a jump through a table."""
    text = """
k:
        /*0000*/                   BRX R2 -0x10 (*"BRANCH_TARGETS .L_x_1,.L_x_2"*);
.L_x_1:
        /*0010*/                   FADD R1, R2, R3 ;
        /*0020*/                   EXIT ;
.L_x_2:
        /*0030*/                   EXIT ;
"""
    assert machine_code.blocks(text)[0].after == {1, 2}
    assert machine_code.main_loop(machine_code.blocks(text)) == 2


@pytest.mark.parametrize(
    ("opcode", "counted"),
    [
        ("LDG.E.ENL2.256", {"LDG": 1, "LDG.128": 1}),
        ("LDGSTS.E.BYPASS.128", {"LDGSTS": 1, "LDG.128": 1}),
        ("LDG.E.U16", {"LDG": 1}),
        ("UTCHMMA.2CTA", {"UTCHMMA": 1}),
        ("LDS.128", {}),
    ],
)
def test_what_an_opcode_counts_as(opcode, counted):
    assert machine_code.counts([machine_code.Block([opcode], set())]) == counted
