// POST with a table in every multiply-accumulate: a single column of 2^B_A words, packed in TABLE, holds
// round(a 2^F / sqrt2) (F = 0: the integer table); it is shifted like the even exponents.
// Lossless accumulator for these products: W = B_A + S + F + 1 + ceil(log2 N).
module post_table #(
    parameter B_A = 4, parameter B_W = 4, parameter F = 0, parameter N = 576,
    parameter [(B_A+F)*(1<<B_A)-1:0] TABLE = 0,
    parameter S = ((1 << (B_W - 1)) - 2) / 2,
    parameter W = B_A + S + F + 1 + $clog2(N)
) (
    input            clk,
    input            clear,
    input  [B_A-1:0] a,
    input  [B_W-1:0] code,
    output [W-1:0]   acc
);
    localparam X = B_A + F;
    wire [X-1:0] whole = {{F{1'b0}}, a} << F;
    wire [X-1:0] root;
    pick #(.COUNT(1 << B_A), .WIDTH(X)) read (.words(TABLE), .index(a), .word(root));
    post_shift_add #(.B_X(X), .B_W(B_W), .N(N)) mac (
        .clk(clk), .clear(clear), .operand(code[0] ? root : whole), .code(code),
        .acc(acc));
endmodule
