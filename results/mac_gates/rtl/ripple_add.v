// Ripple-carry adder: one full adder a bit (2 XOR and 3 gates for the carry).
module ripple_add #(parameter WIDTH = 8) (
    input  [WIDTH-1:0] x,
    input  [WIDTH-1:0] y,
    input              carry_in,
    output [WIDTH-1:0] sum,
    output             carry_out
);
    wire [WIDTH:0] carry;
    assign carry[0] = carry_in;
    genvar i;
    generate
        for (i = 0; i < WIDTH; i = i + 1) begin : bit_
            wire half = x[i] ^ y[i];
            assign sum[i] = half ^ carry[i];
            assign carry[i+1] = (x[i] & y[i]) | (half & carry[i]);
        end
    endgenerate
    assign carry_out = carry[WIDTH];
endmodule
