// POST with the activation prepared once and shared: a (B_A bits) and a_root = a/sqrt2 with F
// fraction bits (post_prepare); the parity of the exponent picks one of the two.
// Lossless accumulator: W = B_A + S + F + 1 + ceil(log2 N), in units of 2^-(S+F).
module post_broadcast #(
    parameter B_A = 8, parameter B_W = 4, parameter F = 2, parameter N = 576,
    parameter S = ((1 << (B_W - 1)) - 2) / 2,
    parameter W = B_A + S + F + 1 + $clog2(N)
) (
    input              clk,
    input              clear,
    input  [B_A-1:0]   a,
    input  [B_A+F-1:0] a_root,
    input  [B_W-1:0]   code,
    output [W-1:0]     acc
);
    wire [B_A+F-1:0] whole = {{F{1'b0}}, a} << F;
    post_shift_add #(.B_X(B_A + F), .B_W(B_W), .N(N)) mac (
        .clk(clk), .clear(clear), .operand(code[0] ? a_root : whole), .code(code), .acc(acc));
endmodule
