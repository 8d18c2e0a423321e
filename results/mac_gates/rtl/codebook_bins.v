// Codebook by bin accumulation: one unsigned accumulator a level, one adder; the 2^B_W
// multiplications by the levels follow once an output, outside. W = B_A + ceil(log2 N), unsigned.
module codebook_bins #(
    parameter B_A = 8, parameter B_W = 4, parameter N = 576,
    parameter W = B_A + $clog2(N)
) (
    input                      clk,
    input                      clear,
    input  [B_A-1:0]           a,
    input  [B_W-1:0]           code,
    output [W*(1<<B_W)-1:0]    acc
);
    wire [W-1:0] base, sum;
    pick #(.COUNT(1 << B_W), .WIDTH(W)) read (.words(acc), .index(code), .word(base));
    ripple_add #(.WIDTH(W)) add (
        .x(base), .y({{(W - B_A){1'b0}}, a}), .carry_in(1'b0),
        .sum(sum), .carry_out());
    genvar i;
    generate
        for (i = 0; i < (1 << B_W); i = i + 1) begin : bin
            reg [W-1:0] value;
            always @(posedge clk or posedge clear)
                if (clear) value <= 0;
                else if (code == i) value <= sum;
            assign acc[W*i +: W] = value;
        end
    endgenerate
endmodule
