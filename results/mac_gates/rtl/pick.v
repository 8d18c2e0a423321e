// Picks one of COUNT words: a multiplexer tree a bit.
module pick #(parameter COUNT = 4, parameter WIDTH = 8, parameter INDEX = $clog2(COUNT)) (
    input  [COUNT*WIDTH-1:0] words,
    input  [INDEX-1:0]       index,
    output [WIDTH-1:0]       word
);
    genvar i, j;
    generate
        for (j = 0; j < WIDTH; j = j + 1) begin : bit_
            wire [(1<<INDEX)-1:0] column;
            for (i = 0; i < (1 << INDEX); i = i + 1) begin : row
                if (i < COUNT) assign column[i] = words[i*WIDTH+j];
                else assign column[i] = 1'b0;
            end
            assign word[j] = column[index];
        end
    endgenerate
endmodule
