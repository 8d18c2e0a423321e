// a/sqrt2 with F fraction bits, by a dyadic constant: (a * C * 2^F + 2^(T-1)) >> T,
// with C/2^T = 181/256 or 45/64. Stands once an activation, shared by all output channels.
module post_prepare #(
    parameter B_A = 8, parameter F = 2, parameter C = 181, parameter T = (C == 181) ? 8 : 6
) (
    input  [B_A-1:0]   a,
    output [B_A+F-1:0] a_root
);
    localparam X = B_A + 1 + T;
    wire [X-1:0] product;
    constant_multiply #(.WIDTH(B_A + 1), .C(C)) multiply (.x({1'b0, a}), .product(product));
    wire [X-1:0] sum;
    ripple_add #(.WIDTH(X)) add (
        .x(product), .y({{(X-1){1'b0}}, 1'b1} << (T - F - 1)), .carry_in(1'b0),
        .sum(sum), .carry_out());
    assign a_root = sum[T-F +: B_A+F];
endmodule
