// Eq. 18 as printed: a for k = 0, a >> k/2 for even k, an integer table LUT(k, a) for odd k. Lossy.
// TABLE packs round(a 2^(-k/2)) at word (k-1)/2 * 2^B_A + a. code = {sign, k}; k all ones means zero.
// W = B_A + 1 + ceil(log2 N) holds every sum of these products.
module post_literal #(
    parameter B_A = 4, parameter B_W = 4, parameter N = 576,
    parameter [B_A*(1<<(B_A+B_W-2))-1:0] TABLE = 0,
    parameter W = B_A + 1 + $clog2(N)
) (
    input              clk,
    input              clear,
    input  [B_A-1:0]   a,
    input  [B_W-1:0]   code,
    output reg [W-1:0] acc
);
    localparam ROWS = 1 << B_A, COLUMNS = 1 << (B_W - 2);
    wire [B_W-2:0] k = code[B_W-2:0];
    wire is_zero = &k;
    wire negative = code[B_W-1] & ~is_zero;
    wire [B_A-1:0] odd;
    pick #(.COUNT(ROWS * COLUMNS), .WIDTH(B_A)) read (
        .words(TABLE), .index({k[B_W-2:1], a}), .word(odd));
    wire [B_A-1:0] even = a >> k[B_W-2:1];
    wire [B_A-1:0] magnitude = (k[0] ? odd : even) & {B_A{~is_zero}};
    wire [W-1:0] sum;
    ripple_add #(.WIDTH(W)) add (
        .x(acc), .y({W{negative}} ^ {{(W - B_A){1'b0}}, magnitude}), .carry_in(negative),
        .sum(sum), .carry_out());
    always @(posedge clk or posedge clear)
        if (clear) acc <= 0;
        else acc <= sum;
endmodule
