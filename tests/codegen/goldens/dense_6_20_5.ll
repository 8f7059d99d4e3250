target datalayout = "e-m:e-p270:32:32-p271:32:32-p272:64:64-i64:64-i128:128-f80:128-n8:16:32:64-S128"
target triple = "x86_64-unknown-linux-gnu"

define hidden i32 @dense(ptr %frame, ptr noalias %arg0, ptr noalias %arg1, ptr noalias %arg2) #0 {
entry:
  %buf11 = alloca [16 x float], align 32
  %buf48 = alloca [16 x float], align 32
  br label %loop1
loop1:
  %i3 = phi i64 [ 0, %entry ], [ %t96, %done5 ]
  br label %loop4
loop4:
  %i6 = phi i64 [ 0, %loop1 ], [ %t94, %join9 ]
  %t7 = icmp slt i64 %i6, 2
  br i1 %t7, label %then8, label %else10
then8:
  store <8 x float> splat (float 0x0000000000000000), ptr %buf11, align 32
  %t12 = getelementptr inbounds float, ptr %buf11, i64 8
  store <8 x float> splat (float 0x0000000000000000), ptr %t12, align 32
  br label %loop13
loop13:
  %i15 = phi i64 [ 0, %then8 ], [ %t38, %loop13 ]
  %t16 = mul nsw i64 %i3, 10
  %t17 = add nsw i64 %t16, %i15
  %t18 = getelementptr inbounds float, ptr %arg0, i64 %t17
  %t19 = load float, ptr %t18, align 4
  %t20 = mul nsw i64 %i6, 8
  %t21 = mul nsw i64 %i15, 20
  %t22 = add nsw i64 %t20, %t21
  %t23 = getelementptr inbounds float, ptr %arg1, i64 %t22
  %t24 = load <8 x float>, ptr %t23, align 4
  %t25 = load <8 x float>, ptr %buf11, align 32
  %t26 = insertelement <8 x float> poison, float %t19, i64 0
  %t27 = shufflevector <8 x float> %t26, <8 x float> poison, <8 x i32> zeroinitializer
  %t28 = call <8 x float> @llvm.fma.v8f32(<8 x float> %t27, <8 x float> %t24, <8 x float> %t25)
  store <8 x float> %t28, ptr %buf11, align 32
  %t29 = getelementptr inbounds float, ptr %t18, i64 5
  %t30 = load float, ptr %t29, align 4
  %t31 = load <8 x float>, ptr %t23, align 4
  %t32 = getelementptr inbounds float, ptr %buf11, i64 8
  %t33 = load <8 x float>, ptr %t32, align 32
  %t34 = insertelement <8 x float> poison, float %t30, i64 0
  %t35 = shufflevector <8 x float> %t34, <8 x float> poison, <8 x i32> zeroinitializer
  %t36 = call <8 x float> @llvm.fma.v8f32(<8 x float> %t35, <8 x float> %t31, <8 x float> %t33)
  %t37 = getelementptr inbounds float, ptr %buf11, i64 8
  store <8 x float> %t36, ptr %t37, align 32
  %t38 = add nuw nsw i64 %i15, 1
  %t39 = icmp slt i64 %t38, 5
  br i1 %t39, label %loop13, label %done14
done14:
  %t40 = load <8 x float>, ptr %buf11, align 32
  %t41 = mul nsw i64 %i3, 40
  %t42 = mul nsw i64 %i6, 8
  %t43 = add nsw i64 %t41, %t42
  %t44 = getelementptr inbounds float, ptr %arg2, i64 %t43
  store <8 x float> %t40, ptr %t44, align 4
  %t45 = getelementptr inbounds float, ptr %buf11, i64 8
  %t46 = load <8 x float>, ptr %t45, align 32
  %t47 = getelementptr inbounds float, ptr %t44, i64 20
  store <8 x float> %t46, ptr %t47, align 4
  br label %join9
else10:
  store <8 x float> splat (float 0x0000000000000000), ptr %buf48, align 32
  %t49 = getelementptr inbounds float, ptr %buf48, i64 8
  store <8 x float> splat (float 0x0000000000000000), ptr %t49, align 32
  br label %loop50
loop50:
  %i52 = phi i64 [ 0, %else10 ], [ %t79, %loop50 ]
  %t53 = mul nsw i64 %i6, 8
  %t54 = insertelement <8 x i64> poison, i64 %t53, i64 0
  %t55 = shufflevector <8 x i64> %t54, <8 x i64> poison, <8 x i32> zeroinitializer
  %t56 = add <8 x i64> %t55, <i64 0, i64 1, i64 2, i64 3, i64 4, i64 5, i64 6, i64 7>
  %t57 = icmp slt <8 x i64> %t56, splat (i64 20)
  %t58 = mul nsw i64 %i3, 10
  %t59 = add nsw i64 %t58, %i52
  %t60 = getelementptr inbounds float, ptr %arg0, i64 %t59
  %t61 = load float, ptr %t60, align 4
  %t62 = mul nsw i64 %i52, 20
  %t63 = add nsw i64 %t53, %t62
  %t64 = getelementptr inbounds float, ptr %arg1, i64 %t63
  %t65 = call <8 x float> @llvm.masked.load.v8f32.p0(ptr align 4 %t64, <8 x i1> %t57, <8 x float> zeroinitializer)
  %t66 = load <8 x float>, ptr %buf48, align 32
  %t67 = insertelement <8 x float> poison, float %t61, i64 0
  %t68 = shufflevector <8 x float> %t67, <8 x float> poison, <8 x i32> zeroinitializer
  %t69 = call <8 x float> @llvm.fma.v8f32(<8 x float> %t68, <8 x float> %t65, <8 x float> %t66)
  store <8 x float> %t69, ptr %buf48, align 32
  %t70 = getelementptr inbounds float, ptr %t60, i64 5
  %t71 = load float, ptr %t70, align 4
  %t72 = call <8 x float> @llvm.masked.load.v8f32.p0(ptr align 4 %t64, <8 x i1> %t57, <8 x float> zeroinitializer)
  %t73 = getelementptr inbounds float, ptr %buf48, i64 8
  %t74 = load <8 x float>, ptr %t73, align 32
  %t75 = insertelement <8 x float> poison, float %t71, i64 0
  %t76 = shufflevector <8 x float> %t75, <8 x float> poison, <8 x i32> zeroinitializer
  %t77 = call <8 x float> @llvm.fma.v8f32(<8 x float> %t76, <8 x float> %t72, <8 x float> %t74)
  %t78 = getelementptr inbounds float, ptr %buf48, i64 8
  store <8 x float> %t77, ptr %t78, align 32
  %t79 = add nuw nsw i64 %i52, 1
  %t80 = icmp slt i64 %t79, 5
  br i1 %t80, label %loop50, label %done51
done51:
  %t81 = mul nsw i64 %i6, 8
  %t82 = insertelement <8 x i64> poison, i64 %t81, i64 0
  %t83 = shufflevector <8 x i64> %t82, <8 x i64> poison, <8 x i32> zeroinitializer
  %t84 = add <8 x i64> %t83, <i64 0, i64 1, i64 2, i64 3, i64 4, i64 5, i64 6, i64 7>
  %t85 = icmp slt <8 x i64> %t84, splat (i64 20)
  %t86 = load <8 x float>, ptr %buf48, align 32
  %t87 = mul nsw i64 %i3, 40
  %t88 = mul nsw i64 %i6, 8
  %t89 = add nsw i64 %t87, %t88
  %t90 = getelementptr inbounds float, ptr %arg2, i64 %t89
  call void @llvm.masked.store.v8f32.p0(<8 x float> %t86, ptr align 4 %t90, <8 x i1> %t85)
  %t91 = getelementptr inbounds float, ptr %buf48, i64 8
  %t92 = load <8 x float>, ptr %t91, align 32
  %t93 = getelementptr inbounds float, ptr %t90, i64 20
  call void @llvm.masked.store.v8f32.p0(<8 x float> %t92, ptr align 4 %t93, <8 x i1> %t85)
  br label %join9
join9:
  %t94 = add nuw nsw i64 %i6, 1
  %t95 = icmp slt i64 %t94, 3
  br i1 %t95, label %loop4, label %done5
done5:
  %t96 = add nuw nsw i64 %i3, 1
  %t97 = icmp slt i64 %t96, 3
  br i1 %t97, label %loop1, label %done2
done2:
  ret i32 0
}

declare <8 x float> @llvm.fma.v8f32(<8 x float>, <8 x float>, <8 x float>)
declare <8 x float> @llvm.masked.load.v8f32.p0(ptr, <8 x i1>, <8 x float>)
declare void @llvm.masked.store.v8f32.p0(<8 x float>, ptr, <8 x i1>)

attributes #0 = { nounwind "no-builtins" "tune-cpu"="x86-64-v3" "prefer-vector-width"="256" "min-legal-vector-width"="256" }

!llvm.module.flags = !{!0, !1}
!0 = !{i32 8, !"PIC Level", i32 2}
!1 = !{i32 7, !"uwtable", i32 0}
