// Uniform multiply-accumulate: unsigned a, two's-complement weight.
// Lossless accumulator: W = B_A + B_W + ceil(log2 N).
module uniform_mac #(
    parameter B_A = 8, parameter B_W = 8, parameter N = 576,
    parameter W = B_A + B_W + $clog2(N)
) (
    input              clk,
    input              clear,
    input  [B_A-1:0]   a,
    input  [B_W-1:0]   code,
    output reg [W-1:0] acc
);
    wire [B_A+B_W-1:0] product;
    array_multiply #(.A_BITS(B_A), .B_BITS(B_W)) multiply (.a(a), .b(code), .product(product));
    wire [W-1:0] sum;
    ripple_add #(.WIDTH(W)) add (
        .x(acc), .y({{(W - B_A - B_W){product[B_A+B_W-1]}}, product}), .carry_in(1'b0),
        .sum(sum), .carry_out());
    always @(posedge clk or posedge clear)
        if (clear) acc <= 0;
        else acc <= sum;
endmodule
