// Shift, sign and accumulate of POST with one accumulator: adds +-(operand << S - floor(k/2)).
// code = {sign, k}; k all ones means zero. The operand has B_A + F bits.
module post_shift_add #(
    parameter B_X = 8, parameter B_W = 4, parameter N = 576,
    parameter S = ((1 << (B_W - 1)) - 2) / 2,
    parameter W = B_X + S + 1 + $clog2(N)
) (
    input              clk,
    input              clear,
    input  [B_X-1:0]   operand,
    input  [B_W-1:0]   code,
    output reg [W-1:0] acc
);
    localparam P = B_X + S;
    localparam ST = (S > 0) ? $clog2(S + 1) : 1;
    wire [B_W-2:0] k = code[B_W-2:0];
    wire is_zero = &k;
    wire negative = code[B_W-1] & ~is_zero;
    wire [B_W-2:0] places = S - (k >> 1);
    wire [P-1:0] gated = {{S{1'b0}}, operand & {B_X{~is_zero}}};
    wire [P-1:0] magnitude = gated << places[ST-1:0];
    wire [W-1:0] sum;
    ripple_add #(.WIDTH(W)) add (
        .x(acc), .y({W{negative}} ^ {{(W - P){1'b0}}, magnitude}), .carry_in(negative),
        .sum(sum), .carry_out());
    always @(posedge clk or posedge clear)
        if (clear) acc <= 0;
        else acc <= sum;
endmodule
