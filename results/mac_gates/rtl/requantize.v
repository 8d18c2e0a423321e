// Fixed-point requantization: clamp((x * m + 2^(s-1)) >> s, 0, 2^B - 1); x signed of W bits, m
// unsigned of M bits, s from 1 to 2^SB - 1.
module requantize #(
    parameter W = 20, parameter M = 16, parameter SB = 6, parameter B = 8
) (
    input  [W-1:0]  x,
    input  [M-1:0]  m,
    input  [SB-1:0] s,
    output [B-1:0]  y
);
    localparam X = W + M + 1;
    wire [W+M-1:0] product;
    array_multiply #(.A_BITS(M), .B_BITS(W)) multiply (.a(m), .b(x), .product(product));
    wire [X-1:0] half = ({{(X-1){1'b0}}, 1'b1} << s) >> 1;
    wire [X-1:0] sum;
    ripple_add #(.WIDTH(X)) add (
        .x({product[W+M-1], product}), .y(half), .carry_in(1'b0), .sum(sum), .carry_out());
    wire signed [X-1:0] shifted = $signed(sum) >>> s;
    wire too_large = |shifted[X-2:B];
    assign y = shifted[X-1] ? {B{1'b0}} : too_large ? {B{1'b1}} : shifted[B-1:0];
endmodule
