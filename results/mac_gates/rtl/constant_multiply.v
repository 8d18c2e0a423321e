// Signed x times 45 (two adders: 5 * 9) or 181 (three: 4 * 45 + 1), exact in WIDTH + T bits.
module constant_multiply #(
    parameter WIDTH = 20, parameter C = 181, parameter T = (C == 181) ? 8 : 6
) (
    input  [WIDTH-1:0]   x,
    output [WIDTH+T-1:0] product
);
    localparam X5 = WIDTH + 3, X45 = WIDTH + 6;
    wire [X5-1:0] five;
    wire [X45-1:0] fortyfive;
    // The lowest bits of x, and of five, pass by the adders: only the overlapping bits are added.
    assign five[1:0] = x[1:0];
    ripple_add #(.WIDTH(X5 - 2)) add5 (
        .x({x[WIDTH-1], x}), .y({{3{x[WIDTH-1]}}, x[WIDTH-1:2]}), .carry_in(1'b0),
        .sum(five[X5-1:2]), .carry_out());
    assign fortyfive[2:0] = five[2:0];
    ripple_add #(.WIDTH(X45 - 3)) add45 (
        .x(five), .y({{3{five[X5-1]}}, five[X5-1:3]}), .carry_in(1'b0),
        .sum(fortyfive[X45-1:3]), .carry_out());
    generate
        if (C == 45) assign product = fortyfive;
        else begin : by_181
            assign product[1:0] = x[1:0];
            ripple_add #(.WIDTH(X45)) add181 (
                .x(fortyfive), .y({{8{x[WIDTH-1]}}, x[WIDTH-1:2]}), .carry_in(1'b0),
                .sum(product[X45+1:2]), .carry_out());
        end
    endgenerate
endmodule
